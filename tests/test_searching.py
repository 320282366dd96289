"""Suggestions in batches, and the search of the grid with them, without Ray, also interrupted."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.sweep import searching
from mlprune.sweep.plan import SweepPlan, select_variants
from mlprune.sweep.prepare import prepare
from mlprune.sweep.searching import BATCH, Point, Suggestions
from mlprune.sweep.stage import Purpose
from mlprune.sweep.verdict import Verdict, run_stages
from tests.local_runner import KilledError, LocalRunner, planned
from tests.text_model import TextModel
from tests.tiny_models import source

HARM = {"mono:en": 0.10, "mono:fr": 0.02, "mono:de": 0.2, "translation:en-fr": 0.4, None: 0.6}
SEARCH: dict[str, Any] = {
    "calibration": ["mono:en", "mono:fr", "mono:de", "translation:en-fr"],
    "score": ["wanda", "ria", "magnitude"],
    "sparsity": [0.3, 0.5, 0.6, 0.7],
    "propagation": ["dense"],
    "searcher": "optuna",
    "samples": 14,
}


def none() -> Iterator[Point]:
    return iter(())


def test_points_are_new_and_a_batch_is_not_one_neighbourhood() -> None:
    """The value is best at x = 0.3; points that round to the same tenth are one."""
    suggestions = Suggestions({"x": None}, lambda point: round(point["x"], 2), none(), seed=1)
    values: dict[float, float] = {}
    for _ in range(10):
        batch = suggestions.ask(4)
        assert len(set(batch)) == 4
        assert not set(batch) & values.keys()
        known = {x: (x - 0.3) ** 2 for x in batch}
        suggestions.tell(known)
        values |= known
    first, last = list(values)[:12], list(values)[-12:]
    assert sum(abs(x - 0.3) for x in last) < 0.6 * sum(abs(x - 0.3) for x in first)


def test_suggestions_follow_from_seed_and_values() -> None:
    def suggested(seed: int, sign: int) -> list[Any]:
        suggestions = Suggestions({"a": ["x", "y", None], "u": None}, lambda p: tuple(p.values()), none(), seed)
        batches = []
        for _ in range(6):
            batches.append(suggestions.ask(3))
            suggestions.tell({point: sign * point[1] for point in batches[-1]})
        return batches

    assert suggested(0, 1) == suggested(0, 1)
    assert suggested(0, 1) != suggested(1, 1)
    assert suggested(0, 1)[:2] == suggested(0, -1)[:2], "the first are random"
    assert suggested(0, 1) != suggested(0, -1)


def test_a_search_begins_with_its_first_points_and_exhausts_a_finite_space() -> None:
    points = [{"a": letter, "b": number} for letter in "pqr" for number in (1, 2)]
    suggestions = Suggestions(
        {"a": ["p", "q", "r"], "b": [1, 2]}, lambda p: f"{p['a']}{p['b']}", points, 0, first=[points[3], points[1]]
    )
    batches = []
    while batch := suggestions.ask(4):
        batches.append(batch)
        suggestions.tell({point: float(point[1]) for point in batch})
    assert batches[0][:2] == ["q2", "p2"]
    assert [len(batch) for batch in batches] == [4, 2]
    assert sorted(point for batch in batches for point in batch) == ["p1", "p2", "q1", "q2", "r1", "r2"]


@pytest.mark.parametrize("minimize", [True, False])
def test_nan_is_the_worst_and_what_failed_is_not_suggested_again(minimize: bool) -> None:
    """The best value is at 0.8, and all values below 0.5 are NaN."""
    suggestions = Suggestions({"x": None}, lambda p: round(p["x"], 3), none(), 0, minimize=minimize)
    sign = 1 if minimize else -1
    points: list[float] = []
    for turn in range(10):
        batch = suggestions.ask(4)
        points += batch
        values = {x: math.nan if x < 0.5 else sign * abs(x - 0.8) for x in batch}
        if turn == 0:
            del values[batch[0]]
        suggestions.tell(values)
    assert len(set(points)) == len(points)
    assert sum(x < 0.5 for x in points[:16]) > 4
    assert sum(x < 0.5 for x in points[-16:]) < 4


# the grid


def harm(variant: Variant, language: str = "") -> float:
    return variant.sparsity * HARM[variant.calibration_text] + 0.05 * (variant.score.name == "ria")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    values = {
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 64},
        "search": SEARCH,
        "evaluation": {"perplexity": {"languages": ["en", "fr"], "lines": 8, "confirmation_lines": 2}},
        "storage": str(tmp_path_factory.mktemp("base")),
    }
    spec = parse_spec(values)
    variants = select_variants(spec.search, spec.calibration.seed)
    return SweepPlan(prepare(spec, variants), variants, ())


def verdict_of(plan: SweepPlan, **options: Any) -> tuple[Verdict, LocalRunner]:
    runner = LocalRunner(plan, TextModel(plan.prepared, harm), **options)
    return run_stages(plan, runner), runner


def evaluated(runner: LocalRunner) -> list[Variant | None]:
    return [variant for purpose, variant in runner.ran if purpose is Purpose.SELECT]


def test_optuna_finds_good_trials_of_the_grid_and_evaluates_as_many_as_were_requested(
    base: SweepPlan, tmp_path: Path
) -> None:
    verdict, runner = verdict_of(planned(base, tmp_path))
    chosen = evaluated(runner)
    assert len(chosen) == len(set(chosen)) == 14
    assert set(chosen) < set(base.variants)
    assert {entry.variant for entry in verdict.ranking} == set(chosen)
    late = [harm(one) for one in chosen[-6:] if one]
    assert fmean(late) < fmean(map(harm, base.variants))
    assert runner.totals == {"pruning and evaluating": [14] * math.ceil(14 / BATCH)}
    assert runner.counts["pruning and evaluating"] == [4, 8, 12, 14]


def test_samples_beyond_the_grid_are_the_grid(base: SweepPlan, tmp_path: Path) -> None:
    _, runner = verdict_of(planned(base, tmp_path, samples=100, sparsity=(0.5, 0.7)))
    assert len(evaluated(runner)) == len(set(evaluated(runner))) == 18


def test_an_interrupted_search_makes_the_same_suggestions(base: SweepPlan, tmp_path: Path) -> None:
    expected, undisturbed = verdict_of(planned(base, tmp_path / "undisturbed"))
    ran: list[Any] = []
    while True:
        plan = planned(base, tmp_path / "killed")
        runner = LocalRunner(plan, TextModel(plan.prepared, harm), dies=3)
        try:
            verdict = run_stages(plan, runner)
        except KilledError:
            ran += runner.ran
            continue
        break
    assert [*ran, *runner.ran] == undisturbed.ran
    assert [entry.key for entry in verdict.ranking] == [entry.key for entry in expected.ranking]
    assert runner.counts["pruning and evaluating"] == [4, 8, 12, 14], "stored results are counted"


def test_an_interrupted_search_repeats_what_the_results_led_to(
    base: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed, or other values, lead to other trials: the test above could fail."""
    _, plain = verdict_of(planned(base, tmp_path / "plain"))
    monkeypatch.setattr(searching, "lower_is_better", lambda _: False)
    _, turned = verdict_of(planned(base, tmp_path / "turned"))
    assert evaluated(turned)[:4] == evaluated(plain)[:4]
    assert evaluated(turned) != evaluated(plain)
    assert fmean(harm(one) for one in evaluated(turned) if one) > fmean(map(harm, base.variants))
