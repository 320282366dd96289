"""Races: which variants a block drops, by hand; and whole races on a tiny model, without Ray, held to a plain run."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlprune.evaluation.items import from_json
from mlprune.evaluation.significance import holm
from mlprune.evaluation.suite import Suite
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.plan import SweepPlan, select_variants
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.racing import race, to_drop
from mlprune.sweep.ranking import Standing, Trial, difference, loss_estimate
from mlprune.sweep.session import open_local
from mlprune.sweep.stage import Stage
from mlprune.sweep.stage_runner import StageRunner
from mlprune.sweep.trial import run_dense, run_trial, trial_metrics
from mlprune.sweep.verdict import Verdict, run_stages
from tests.runs import names
from tests.tiny_models import source
from tests.trials import DE, DENSE, EN, ES, FR, seeds_of, texts, trial, variant


def by_variant(*trials: Trial) -> dict[Variant, Trial]:
    return {one.result.variant: one for one in trials if one.result.variant}


def dropped(*trials: Trial, metric: str = "loss.mean", looks: int = 2) -> list[Variant]:
    """Return the dropped variants, and check that they are in the given order, which does not matter."""
    losers = to_drop(by_variant(*trials), DENSE, metric, looks)
    shuffled = random.Random(len(trials)).sample(trials, len(trials))
    assert set(to_drop(by_variant(*shuffled), DENSE, metric, looks)) == set(losers)
    assert losers == [one for one in by_variant(*trials) if one in losers]
    return losers


def test_the_clearly_worse_are_dropped_and_the_close_ones_are_not() -> None:
    trials = [
        trial(DE, texts([0.6, 0.6], 0.02, 1)),
        trial(EN, texts([0.2, 0.2], 0.02, 2)),
        trial(FR, texts([0.201, 0.201], 0.02, 3)),
        trial(ES, texts([0.4, 0.5], 0.02, 4)),
    ]
    assert dropped(*trials) == [DE, ES]


def test_each_sparsity_has_its_leader() -> None:
    """The leader of the higher sparsity has lost much more than all others."""
    sparser = [variant(f"mono:{code}", sparsity=0.7) for code in ("en", "fr")]
    trials = [trial(one, texts([0.8 + 0.3 * place] * 2, 0.02, place)) for place, one in enumerate(sparser)]
    assert dropped(*trials, trial(EN, texts([0.1, 0.1], 0.02, 5)), trial(FR, texts([0.3, 0.3], 0.02, 6))) == [
        sparser[1],
        FR,
    ]


def test_the_objective_decides_who_leads() -> None:
    trials = [trial(EN, texts([0.0, 0.3], 0.02, 1)), trial(FR, texts([0.2, 0.2], 0.02, 2))]
    assert dropped(*trials) == [FR]
    assert dropped(*trials, metric="loss.worst") == [EN]
    assert dropped(*trials, metric="loss.en") == [FR]


def test_the_level_is_divided_by_the_looks_and_by_the_variants() -> None:
    leader = trial(EN, texts([0.1, 0.1], 0.02, 0))
    other = trial(FR, texts([0.113, 0.113], 0.02, 1))
    p = difference([other], [leader], DENSE, "loss.mean").p
    looks = math.ceil(0.05 / p)
    assert 2 < looks < 30, "choose other texts"
    assert dropped(leader, other, looks=looks - 1) == [FR]
    assert dropped(leader, other, looks=looks) == []
    for count in range(1, 2 * looks):
        twins = [trial(variant(f"mono:{code}"), other.items) for code in CODES[:count]]
        ps = holm([difference([one], [leader], DENSE, "loss.mean").p for one in twins])
        assert bool(dropped(leader, *twins, looks=1)) == (ps[0] < 0.05)
    assert dropped(leader, *[trial(variant(f"mono:{code}"), other.items) for code in CODES[:looks]], looks=1) == []


CODES = "fr de es hi sw ru ar ja ko vi th tr zh it pt nl pl cs sv da fi hu el he id ms ro bg uk hr sk sl lt lv et".split()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["loss.mean", "loss.worst"])
def test_a_loss_that_is_not_finite_is_dropped_and_never_leads(broken: float, metric: str) -> None:
    bad = trial(EN, texts([broken, 0.0]))
    close = [trial(FR, texts([0.2, 0.2], 0.02, 1)), trial(DE, texts([0.201, 0.201], 0.02, 2))]
    assert dropped(bad, *close, metric=metric) == [EN]
    assert dropped(bad, close[0], metric=metric) == [EN]
    assert dropped(bad, trial(FR, texts([0.1, broken])), metric=metric) == []
    assert dropped(bad, metric=metric) == []


def test_equal_variants_and_few_documents_drop_nothing() -> None:
    items = texts([0.2, 0.2], 0.02, 1)
    assert dropped(trial(EN, items), trial(FR, items), trial(DE, items)) == []
    one_document = [[part.select(names(2)) for part in texts([harm, harm])] for harm in (0.1, 0.9)]
    assert dropped(*(trial(one, part) for one, part in zip((EN, FR), one_document, strict=True))) == []


def test_seeds_of_a_variant_share_their_fate() -> None:
    """The best of all trials is a seed of the variant that is worse on average."""
    better = [trial(one, texts([0.3, 0.3], 0.02, one.seed)) for one in seeds_of(EN, 0, 1, 2)]
    harm = {0: 0.2, 1: 0.7, 2: 0.9}
    mixed = [trial(one, texts([harm[one.seed]] * 2, 0.02, one.seed)) for one in seeds_of(FR, 0, 1, 2)]
    assert dropped(mixed[0], *better, *mixed[1:]) == [], "seeds differ so much that nothing is shown"
    worse = [trial(one, texts([0.5, 0.5], 0.02, one.seed)) for one in seeds_of(FR, 0, 1, 2)]
    assert dropped(worse[2], *better, *worse[:2]) == seeds_of(FR, 2, 0, 1)
    broken = [*mixed[:2], trial(seeds_of(FR, 2)[0], texts([math.nan, 0.1]))]
    assert dropped(*better, *broken) == seeds_of(FR, 0, 1, 2)


def test_what_is_better_on_the_seeds_that_both_have_is_not_dropped() -> None:
    """Trials have failed. On average the leader is better, on the only common seed the other one."""
    harm = {(EN, 0): 0.0, (EN, 1): 0.4, (FR, 1): 0.3, (FR, 2): 0.9}
    trials = [
        trial(one, texts([loss, loss], 0.001, 1))
        for (base, seed), loss in harm.items()
        for one in seeds_of(base, seed)
    ]
    assert difference(trials[2:], trials[:2], DENSE, "loss.mean").high < 0
    assert dropped(*trials) == []


# whole races, on a tiny model in this process


@dataclass
class Tracker:
    """What a race logs of trials, in place of MLflow."""

    started: list[str] = field(default_factory=list)
    finished: dict[str, Result] = field(default_factory=dict)

    def start_trial(self, key: str, variant: Variant | None) -> None:
        self.started.append(key)

    def finish_trial(self, result: Result, items: Any, standing: str = "") -> None:
        assert from_json(items())
        self.finished[result.key] = result


class Killed(Exception):
    """The process dies."""


class LocalRunner(StageRunner):
    """Runs the trials of a stage one after another on an open pipeline, and dies before trial number `dies`."""

    def __init__(self, prepared: Prepared, pipeline: Pipeline, dies: int = -1) -> None:
        self.tracker: Any = Tracker()
        super().__init__(prepared, self.tracker, lambda _: None)
        self._pipeline, self._dies = pipeline, dies
        self.ran: list[tuple[str, Variant | None]] = []  # the purpose of the stage, and the trial

    def _evaluate_dense(self, suite: Suite) -> Result:
        return self._kept("dense", None, *run_dense(self._prepared, self._pipeline, suite))

    def _run(self, stage: Stage, todo: Sequence[Variant], count: int) -> dict[Variant, Result]:
        gather_moments(self._prepared, self._pipeline, todo)
        results = {}
        for one in todo:
            trial = run_trial(self._prepared, self._pipeline, one, stage.suite)
            results[one] = self._kept(stage.purpose.name, one, *trial)
        return results

    def _kept(self, purpose: str, one: Variant | None, result: Result, items: str) -> Result:
        if len(self.ran) == self._dies:
            raise Killed
        self._store.save(result, items)
        self.ran.append((purpose, one))
        return result


SEARCH: dict[str, Any] = {
    "calibration": ["mono:en", "translation:en-fr"],
    "score": ["wanda", "magnitude", "inverse-wanda"],
    "sparsity": [0.4, 0.7],
    "propagation": ["dense"],
    "seed": [0, 1],
    "racing": True,
}


def planned(storage: Path, **search: Any) -> SweepPlan:
    values = {
        "name": "race",
        "model": {"path": str(source().folder)},
        "pipeline": {"shards": 1},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 64},
        "search": {**SEARCH, **search},
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 40, "confirmation_lines": 6}},
        "storage": str(storage),
    }
    spec = parse_spec(values)
    variants = select_variants(spec.search, spec.calibration.seed)
    return SweepPlan(prepare(spec, variants), variants, ())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SweepPlan, Pipeline, dict[Variant | None, Trial]]]:
    """All trials on all tasks, without a race, and an open model for further trials."""
    plan = planned(tmp_path_factory.mktemp("plain"))
    prepared = plan.prepared
    with open_local(prepared) as pipeline:
        gather_moments(prepared, pipeline, plan.variants)
        store = prepared.result_store()
        trials = {}
        for one in (None, *plan.variants):
            suite = prepared.suite
            result, items = (
                run_trial(prepared, pipeline, one, suite) if one else run_dense(prepared, pipeline, suite)
            )
            store.save(result, items)
            trials[one] = Trial(result, from_json(items))
        yield plan, pipeline, trials
