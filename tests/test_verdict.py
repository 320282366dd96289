"""The stages of a sweep with screening, racing and confirmation, without Ray, also interrupted before each trial.

Most tests have text in place of a model (`text_model.py`). One test has a tiny model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlprune.evaluation.items import Items, from_json
from mlprune.evaluation.loss import loss_metrics
from mlprune.evaluation.perplexity import Perplexity
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.sweep.plan import SweepPlan, select_variants
from mlprune.sweep.prepare import prepare
from mlprune.sweep.racing import race, to_drop
from mlprune.sweep.ranking import RankedVariant, Standing, Trial
from mlprune.sweep.session import open_local
from mlprune.sweep.stage import Purpose, Stage
from mlprune.sweep.trial import run_trial, trial_metrics
from mlprune.sweep.verdict import Verdict, run_stages
from tests.local_runner import KilledError, LocalRunner, lasting, planned
from tests.text_model import TextModel
from tests.tiny_models import source

LINES, CONFIRMED = 40, 6
HARM = {"mono:en": 0.10, "mono:fr": 0.11, "mono:de": 0.145, "translation:en-fr": 0.4, None: 0.6}
SEARCH: dict[str, Any] = {
    "calibration": ["mono:en", "mono:fr", "mono:de", "translation:en-fr"],
    "score": ["wanda", "magnitude"],
    "sparsity": [0.5, 0.7],
    "propagation": ["dense"],
    "seed": [0, 1],
}


def harm(variant: Variant, language: str = "") -> float:
    return variant.sparsity * HARM[variant.calibration_text] + 0.002 * variant.seed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    """A plan whose spec is replaced in part by `planned`: preparing it takes seconds."""
    folder = tmp_path_factory.mktemp("base")
    rows = [{"premise": f"A {n}", "hypothesis": "B", "label": n % 3} for n in range(4)]
    (folder / "en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 64},
        "search": SEARCH,
        "evaluation": {
            "perplexity": {"languages": ["en", "fr"], "lines": LINES, "confirmation_lines": CONFIRMED},
            "xnli": {"languages": ["en"], "data": str(folder)},
        },
        "storage": str(folder / "store"),
    }
    spec = parse_spec(values)
    variants = select_variants(spec.search, spec.calibration.seed)
    return SweepPlan(prepare(spec, variants), variants, ())


def verdict_of(plan: SweepPlan, **options: Any) -> tuple[Verdict, LocalRunner]:
    runner = LocalRunner(plan, TextModel(plan.prepared, harm), **options)
    return run_stages(plan, runner), runner


def plain_trials(plan: SweepPlan) -> dict[Variant | None, Trial]:
    """Return all trials and the dense model on all tasks, from the stored results of a sweep without a race."""
    store = plan.prepared.result_store()
    results = {one: store.load(plan.prepared.result_key(one)) for one in (None, *plan.variants)}
    return {one: Trial(result, from_json(store.items(result.key))) for one, result in results.items() if result}


def state(verdict: Verdict) -> str:
    """Return what must not depend on when and how often the sweep was interrupted."""

    def entry_state(entry: RankedVariant) -> Any:
        results = [
            (one.key, one.variant, lasting(one.metrics), one.digest) for one in (entry.result, *entry.seeds)
        ]
        return results, entry.standing, entry.lines, entry.loss, entry.to_best, entry.tied, entry.confirmed

    unfinished = [
        (one.result.key, one.standing, one.items, lasting(one.result.metrics)) for one in verdict.unfinished
    ]
    return repr(([entry_state(entry) for entry in verdict.ranking], verdict.agreements, unfinished))


def likelihoods(items: Sequence[Items], lines: int) -> list[Items]:
    return [part.select(part.ids[:lines]) for part in items if part.kind == "likelihood"]


def expected_drops(plan: SweepPlan, trials: Mapping[Variant | None, Trial]) -> dict[Variant, int]:
    """Return the dropped variants with their lines, from plain results: what a race must find with less work."""
    left = {one: trial for one, trial in trials.items() if one is not None}
    drops: dict[Variant, int] = {}
    for lines in (8, 24):
        known = {one: replace(trial, items=likelihoods(trial.items, lines)) for one, trial in left.items()}
        for loser in to_drop(known, trials[None], "loss.mean", looks=2):
            drops[loser] = lines
            del left[loser]
    return drops


def test_a_race_takes_the_decisions_of_a_plain_sweep_and_survivors_have_its_results(
    base: SweepPlan, tmp_path: Path
) -> None:
    plain, racing = planned(base, tmp_path / "plain"), planned(base, tmp_path / "race", racing=True)
    assert {purpose for purpose, _ in verdict_of(plain)[1].ran} == {None, Purpose.SELECT, Purpose.CONFIRM}
    trials = plain_trials(plain)
    drops = expected_drops(plain, trials)
    assert set(drops.values()) == {8, 24}, "choose another harm: each block must drop some"
    verdict, runner = verdict_of(racing)
    survivors = [one for one in racing.variants if one not in drops]
    assert len(survivors) > 2
    for entry in verdict.ranking:
        assert {drops.get(seed.variant, LINES) for seed in entry.seeds if seed.variant} == {entry.lines}
        assert (entry.standing is Standing.DROPPED) == (entry.lines < LINES)
    store = racing.prepared.result_store()
    for one in survivors:
        key = racing.prepared.result_key(one)
        result = store.load(key)
        assert result is not None
        assert lasting(result.metrics) == lasting(trials[one].result.metrics)
        assert from_json(store.items(key)) == trials[one].items
        assert replace(result, metrics={}) == replace(trials[one].result, metrics={})
        assert runner.tracker.finished[key] == result
    for trial in verdict.unfinished:
        loser = trial.result.variant
        assert loser is not None
        assert trial.items == likelihoods(trials[loser].items, drops[loser])
        assert trial.result.metrics.items() >= trial_metrics(trial.items).items()
        assert store.load(trial.result.key) is None
    blocks = [one for purpose, one in runner.ran if purpose is Purpose.BLOCK]
    assert [blocks.count(one) for one in racing.variants] == [
        {8: 1, 24: 2}.get(drops.get(one, 0), 3) for one in racing.variants
    ]


@pytest.mark.parametrize("share", [1, 2])
def test_results_of_an_earlier_sweep_lead_to_the_same_decisions(
    share: int, base: SweepPlan, tmp_path: Path
) -> None:
    """All trials have a result, or every second one: those need no block."""
    expected, _ = verdict_of(planned(base, tmp_path / "new", racing=True))
    earlier = planned(base, tmp_path / "earlier")
    model = TextModel(earlier.prepared, harm)
    runner = LocalRunner(earlier, model)
    runner.run(Stage(Purpose.SELECT, "", earlier.prepared.suite), earlier.variants[::share])
    verdict, runner = verdict_of(planned(base, tmp_path / "earlier", racing=True))
    assert state(verdict) == state(expected)
    in_blocks = {one for purpose, one in runner.ran if purpose is Purpose.BLOCK}
    assert in_blocks == set(earlier.variants) - set(earlier.variants[::share])


def test_a_second_race_runs_nothing(base: SweepPlan, tmp_path: Path) -> None:
    first, _ = verdict_of(planned(base, tmp_path, racing=True, screen=3))
    again, runner = verdict_of(planned(base, tmp_path, racing=True, screen=3))
    assert runner.ran == []
    assert state(again) == state(first)


def test_the_verdict_is_the_same_wherever_the_driver_dies(base: SweepPlan, tmp_path: Path) -> None:
    """It dies after every fifth trial: in screening, in the blocks of the race, and in confirmation."""
    search = {"racing": True, "screen": 2}
    expected, runner = verdict_of(planned(base, tmp_path / "undisturbed", **search))
    purposes = [purpose for purpose, _ in runner.ran]
    assert {None, Purpose.SCREEN, Purpose.BLOCK, Purpose.CONFIRM} == set(purposes)
    ran: list[Any] = []
    step = 5  # trials between two deaths
    while True:
        interrupted = LocalRunner(
            planned(base, tmp_path / "killed", **search), TextModel(base.prepared, harm), dies=step
        )
        try:
            verdict = run_stages(planned(base, tmp_path / "killed", **search), interrupted)
        except KilledError:
            ran += interrupted.ran
            continue
        break
    assert state(verdict) == state(expected)
    assert [*ran, *interrupted.ran] == runner.ran, "a finished trial ran again, or in another order"
    assert len(ran) > 4 * step


def test_a_failed_trial_leaves_the_race_alone(base: SweepPlan, tmp_path: Path) -> None:
    (broken, *_) = [one for one in base.variants if one.seed == 1 and one.calibration_text == "mono:fr"]
    verdict, runner = verdict_of(planned(base, tmp_path, racing=True), broken=[broken])
    assert runner.failed.keys() == {broken}
    assert [one for _, one in runner.ran if one == broken] == []
    ranked = {entry.variant: entry for entry in verdict.ranking}
    assert len(ranked) == len({one.without_seed for one in base.variants})
    assert [seed.variant for seed in ranked[broken.without_seed].seeds] == [broken.without_seed]


def test_only_promising_variants_and_baselines_are_evaluated(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, screen=2)
    verdict, runner = verdict_of(plan)
    evaluated = [one for purpose, one in runner.ran if purpose is Purpose.SELECT]
    good = ("mono:en", "mono:fr", None)  # the text model's forecasts are right
    assert evaluated == [one for one in plan.variants if one.calibration_text in good]
    assert [one for purpose, one in runner.ran if purpose is Purpose.SCREEN] == list(plan.variants)
    screened = [entry for entry in verdict.ranking if entry.standing is Standing.SCREENED]
    assert [(entry.variant.calibration_text, entry.variant.sparsity) for entry in screened] == [
        ("mono:de", 0.5),
        ("mono:de", 0.7),
        ("translation:en-fr", 0.5),
        ("translation:en-fr", 0.7),
    ]
    assert verdict.ranking[-4:] == tuple(screened)
    for entry in screened:
        assert [seed.key for seed in entry.seeds] == [
            plan.prepared.result_key(seed.variant) for seed in entry.seeds
        ]
        assert entry.metrics["forecast.mean"] == pytest.approx(harm(entry.variant) / 10 + 0.0001)
        assert not any("bits_per_byte" in name for name in entry.metrics)
    assert all(trial.items == () and trial.standing is Standing.SCREENED for trial in verdict.unfinished)


@pytest.mark.parametrize("search", [{}, {"racing": True}, {"objective": "xnli.en"}])
def test_the_best_and_what_is_no_worse_are_confirmed_on_other_lines(
    search: dict[str, Any], base: SweepPlan, tmp_path: Path
) -> None:
    plan = planned(base, tmp_path, **search)
    verdict, runner = verdict_of(plan)
    confirmed = [entry for entry in verdict.ranking if entry.confirmed]
    assert confirmed == [entry for entry in verdict.ranking if entry.is_best or entry.tied]
    assert {entry.variant.sparsity for entry in confirmed} == {0.5, 0.7}
    assert 2 < len(confirmed) < len(verdict.ranking) or search.get("objective")
    ran = [one for purpose, one in runner.ran if purpose is Purpose.CONFIRM]
    assert sorted(map(str, ran)) == sorted(str(seed.variant) for entry in confirmed for seed in entry.seeds)
    assert plan.prepared.evaluation is not None
    suite = plan.prepared.evaluation.confirmation
    assert suite is not None
    lines = [
        {line.number for task in tasks for line in task.lines if isinstance(task, Perplexity)}
        for tasks in (
            [t for t in s.likelihood_tasks if isinstance(t, Perplexity)] for s in (suite, plan.prepared.suite)
        )
    ]
    assert (len(lines[0]), len(lines[1]), lines[0] & lines[1]) == (CONFIRMED, LINES, set())
    store = plan.prepared.result_store()
    dense = store.load(plan.prepared.result_key(None, suite))
    assert dense is not None
    for entry in confirmed:
        results = [store.load(plan.prepared.result_key(seed.variant, suite)) for seed in entry.seeds]
        losses = [loss_metrics(one.metrics, dense.metrics)["loss.mean"] for one in results if one]
        assert entry.confirmed is not None
        assert entry.confirmed.value == pytest.approx(sum(losses) / len(entry.seeds), abs=1e-12)
        assert entry.loss is not None
        assert entry.confirmed.value != pytest.approx(entry.loss.value, rel=1e-4)


def test_confirmation_can_be_switched_off(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path)
    assert plan.prepared.evaluation is not None
    off = replace(plan.prepared, evaluation=replace(plan.prepared.evaluation, confirmation=None))
    verdict, runner = verdict_of(replace(plan, prepared=off))
    assert not any(entry.confirmed for entry in verdict.ranking)
    assert {purpose for purpose, _ in runner.ran} == {None, Purpose.SELECT}


def test_if_every_trial_fails_nothing_is_ranked(base: SweepPlan, tmp_path: Path) -> None:
    for search in ({}, {"racing": True}, {"screen": 1}):
        verdict, _ = verdict_of(planned(base, tmp_path, **search), broken=base.variants)
        assert verdict.ranking == ()


def test_a_race_on_a_model_is_bit_identical_to_a_plain_run(tmp_path: Path) -> None:
    values = {
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 64},
        "search": {"score": ["random", "magnitude"], "sparsity": [0.5], "racing": True},
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 16}},
        "storage": str(tmp_path),
    }
    spec = parse_spec(values)
    variants = select_variants(spec.search, 0)
    prepared = prepare(spec, variants)
    plan = SweepPlan(prepared, variants, ())
    store = prepared.result_store()
    with open_local(prepared) as pipeline:
        runner = LocalRunner(plan, pipeline)
        dense = runner.dense(prepared.suite)
        trials = race(prepared, runner, Trial(dense, from_json(store.items(dense.key))), variants)
        survivors = [one for one in trials if one.standing is Standing.EVALUATED]
        assert len(runner.ran) == 1 + len(variants) + len(survivors)
        for trial in survivors:
            assert trial.result.variant is not None
            result, items = run_trial(prepared, pipeline, trial.result.variant, prepared.suite)
            assert lasting(trial.result.metrics) == lasting(result.metrics)
            assert math.isfinite(result.metrics["bits_per_byte.mean"])
            assert (store.items(result.key), trial.result.digest) == (items, result.digest)
