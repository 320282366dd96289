"""Racing: evaluates variants block by block of held-out lines, and drops the worst ones after each block.

After a block, every variant is compared with the leader of its sparsity on all lines so far. One is dropped if it
is significantly worse, by Holm's correction over the variants of the sparsity and Bonferroni's over the blocks.
The decisions depend on stored results alone: they are the same for any number of trials at a time, and after a
resume.

This is the idea of F-Race (Birattari et al. 2002), with the paired test of `evaluation/estimates.py`, and blocks
that double.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlprune.evaluation.items import Items, from_json, join_items, to_json
from mlprune.evaluation.perplexity import Perplexity
from mlprune.evaluation.significance import LEVEL
from mlprune.evaluation.suite import Suite
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.ranking import Standing, Trial, loss_estimate, tests_against
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner
from mlprune.sweep.trial import trial_metrics

OF_MASKS = ("sparsity.", "forecast.")  # the metrics that do not depend on the lines

logger = logging.getLogger(__name__)


def race(prepared: Prepared, runner: StageRunner, dense: Trial, variants: Sequence[Variant]) -> list[Trial]:
    """Race the variants; return all but failed ones, with what they were evaluated on.

    Whoever reaches the last block gets the result that it would have without a race, which is stored as such.
    """
    assert prepared.evaluation is not None
    blocks, store, metric = prepared.evaluation.blocks, prepared.result_store(), prepared.spec.search.metric
    whole = runner.stored(Stage(Purpose.SELECT, "", prepared.suite), variants)  # of an earlier sweep
    racers = {variant: _Racer(prepared, variant, whole.get(variant)) for variant in variants}
    total, dropped = prepared.spec.evaluation.perplexity.lines, list[Trial]()
    for number, suite in enumerate(blocks):
        lines = sum(map(_lines, blocks[: number + 1]))
        stage = Stage(Purpose.BLOCK, f"racing, {lines} of {total} lines", suite)
        for variant, result in runner.run(stage, [v for v in racers if v not in whole]).items():
            racers[variant].add(result, store.items(result.key))
        racers = {variant: racer for variant, racer in racers.items() if variant not in runner.failed}
        if suite is not blocks[-1]:
            trials = {variant: racer.trial(lines) for variant, racer in racers.items()}
            losers = to_drop(trials, dense, metric, looks=len(blocks) - 1)
            dropped += [trials[variant] for variant in losers]
            logger.info("  %d of %d trials dropped after %d lines", len(losers), len(trials), lines)
            racers = {variant: racer for variant, racer in racers.items() if variant not in losers}
    for variant, racer in racers.items():
        if variant not in whole:
            store.save(*racer.whole())
    return [*(racer.trial(total, Standing.EVALUATED) for racer in racers.values()), *dropped]


def to_drop(trials: Mapping[Variant, Trial], dense: Trial, metric: str, looks: int) -> list[Variant]:
    """Return the trials whose variant is significantly worse than the leader of its sparsity, in the given order.

    `looks`: how often the race compares. A loss that is not finite is worse than any other.
    """
    groups: dict[Variant, list[Trial]] = {}
    for variant, trial in trials.items():
        groups.setdefault(variant.without_seed, []).append(trial)
    losers: set[Variant] = set()
    for sparsity in {variant.sparsity for variant in groups}:
        within = {variant: group for variant, group in groups.items() if variant.sparsity == sparsity}
        losses = {variant: loss_estimate(group, dense, metric).value for variant, group in within.items()}
        finite = [variant for variant, loss in losses.items() if math.isfinite(loss)]
        if not finite:
            continue
        leader = min(finite, key=losses.__getitem__)
        others = {variant: group for variant, group in within.items() if variant != leader}
        for variant, (one, p) in tests_against(within[leader], others, dense, metric).items():
            if not math.isfinite(losses[variant]) or (one.value > 0 and p * looks < LEVEL):
                losers.add(variant)
    return [variant for variant in trials if variant.without_seed in losers]


def _lines(suite: Suite) -> int:
    """Return the held-out lines of a block, in each language."""
    task = suite.likelihood_tasks[0]
    assert isinstance(task, Perplexity)
    return len({line.number for line in task.lines})


class _Racer:
    """One trial's results so far: of blocks, or the whole result of an earlier sweep."""

    def __init__(self, prepared: Prepared, variant: Variant, whole: Result | None) -> None:
        self._prepared, self._variant = prepared, variant
        self._results = [whole] if whole else []
        self._items = from_json(prepared.result_store().items(whole.key)) if whole else []

    def add(self, result: Result, items: str) -> None:
        """Add the result of the next block."""
        self._results.append(result)
        self._items = join_items([*self._items, *from_json(items)])

    def trial(self, lines: int, standing: Standing = Standing.DROPPED) -> Trial:
        """Return the trial as it is after that many lines."""
        items = [
            part.select(part.ids[:lines]) if part.kind == "likelihood" else part
            for part in self._items
            if part.kind == "likelihood" or standing is Standing.EVALUATED
        ]
        return Trial(self._result(items), items, standing)

    def whole(self) -> tuple[Result, str]:
        """Return the result over all blocks, and its items."""
        return self._result(self._items), to_json(self._items)

    def _result(self, items: Sequence[Items]) -> Result:
        """Return the result of these items, with the times of all blocks."""
        first = self._results[0]
        of_masks = {name: value for name, value in first.metrics.items() if name.startswith(OF_MASKS)}
        seconds = {
            name: sum(result.metrics[name] for result in self._results)
            for name in first.metrics
            if name.startswith("seconds.")
        }
        metrics = {**of_masks, **trial_metrics(items), **seconds}
        return replace(first, key=self._prepared.result_key(self._variant), metrics=metrics)
