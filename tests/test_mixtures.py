"""Searches for mixtures: the sections of the spec, the arithmetic, and the stages without Ray, also interrupted.

The stages have text in place of a model (`text_model.py`): a language loses less, the more weight its text has.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlprune.errors import SpecError
from mlprune.evaluation.loss import loss_metrics
from mlprune.spec.calibrations import Calibration
from mlprune.spec.loading import parse_spec
from mlprune.spec.mixtures import MinimaxMixture, OptunaMixture, rounded
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant
from mlprune.sweep.mixture_search import minimax_step
from mlprune.sweep.mixtures import evaluated_trials, forecast_trials, mixture_searches
from mlprune.sweep.plan import SweepPlan, select_variants
from mlprune.sweep.prepare import prepare
from mlprune.sweep.ranking import Standing
from mlprune.sweep.stage import Purpose
from mlprune.sweep.verdict import Verdict, run_stages
from tests.local_runner import KilledError, LocalRunner, lasting
from tests.text_model import TextModel
from tests.tiny_models import source

PARTS = ["mono:en", "mono:fr", "mono:de"]
OPTUNA = {"searcher": "optuna", "parts": PARTS, "trials": 24, "evaluate": 2}
MINIMAX = {"searcher": "minimax", "parts": PARTS, "rounds": 5}
FIRST = "search.calibration[0]: "
SEARCH: dict[str, Any] = {
    "calibration": ["mono:en", "mono:fr"],
    "score": ["wanda", "magnitude"],
    "sparsity": [0.5],
    "propagation": ["dense"],
}


def spec(**search: Any) -> SweepSpec:
    return parse_spec({"search": {**SEARCH, **search}})


def refusal(**search: Any) -> str:
    with pytest.raises(SpecError) as caught:
        spec(**search)
    return str(caught.value)


# weights


def test_rounded_weights_sum_to_one_and_are_close() -> None:
    draw = random.Random(1)
    for _ in range(200):
        weights = [draw.random() ** 3 for _ in range(draw.randint(2, 14))]
        found = rounded(weights, 3)
        assert sum(found) == 1
        assert all(weight.denominator <= 1000 for weight in found)
        for one, exact in zip(found, weights, strict=True):
            assert abs(one - Fraction(exact) / sum(map(Fraction, weights))) < Fraction(1, 1000)


def test_rounding_by_hand() -> None:
    assert rounded([5, 3, 3], 1) == [
        Fraction(4, 10),
        Fraction(3, 10),
        Fraction(3, 10),
    ]  # .45, .27, .27: two units left
    assert rounded([1, 1, 1], 3) == [Fraction(1, 3)] * 3, "equal weights are those of a mixture without weights"
    assert rounded([1, 0.0004], 3) == [1, 0]


def test_a_searched_mixture_is_one_that_a_user_can_write() -> None:
    (mixture,) = spec(mixture={**OPTUNA, "combination": "power=2"}).search.mixture
    for weights in ([1, 1, 1], [0.2, 0.5, 0.3], [0, 1, 3], [0.3333, 0.3335, 0.3331]):
        calibration = mixture.calibration(weights)
        assert Calibration.parse(str(calibration)) == calibration
    assert str(mixture.calibration([1, 1, 1])) == "power=2:mono:de,mono:en,mono:fr"
    assert str(mixture.calibration([0, 1, 3])) == "power=2:mono:de=0.75,mono:fr=0.25"
    assert mixture.calibration([0, 1, 0]) == Calibration.parse("mono:fr")


def test_the_minimax_step_by_hand() -> None:
    """Weights 1/2 and 1/2, losses 0.30 and 0.10, eta 6: the mean is 0.20, so the factors are exp(±0.6)."""
    moved = np.exp(minimax_step(np.log([0.5, 0.5]), np.array([0.3, 0.1]), 6.0))
    assert moved / moved.sum() == pytest.approx([0.768525, 0.231475], abs=1e-6)
    # again, with losses 0.20 and 0.26: the mean is 0.23, the factors are exp(∓0.18)
    moved = np.exp(minimax_step(np.log(moved), np.array([0.2, 0.26]), 6.0))
    assert moved / moved.sum() == pytest.approx([0.698465, 0.301535], abs=1e-6)


# the section


def test_defaults_and_a_single_mapping() -> None:
    made = spec(mixture={"searcher": "minimax", "parts": PARTS}).search.mixture
    assert made == spec(mixture=[{"searcher": "minimax", "parts": PARTS}]).search.mixture
    assert isinstance(made[0], MinimaxMixture)
    assert (made[0].rounds, made[0].eta, str(made[0].combination)) == (8, 6, "mix")
    (made_optuna,) = spec(mixture={"searcher": "optuna", "parts": PARTS}).search.mixture
    assert isinstance(made_optuna, OptunaMixture)
    assert (made_optuna.trials, made_optuna.evaluate, made_optuna.objective) == (60, 3, "worst")
    assert spec(mixture=None) == spec()


def test_the_section_survives_being_written_and_changes_the_key() -> None:
    made = spec(mixture=[OPTUNA, {**MINIMAX, "combination": "rank"}], pretraining={"en": 2, "no": 0.5})
    assert parse_spec(made.model_dump(mode="json")) == made
    assert made.key != spec().key
    assert hash(made) == hash(parse_spec(made.model_dump(mode="json")))


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ({**OPTUNA, "parts": ["mono:en"]}, "search.mixture.parts: ['mono:en']: name two or more parts"),
        ({**OPTUNA, "parts": ["mono:en", "mono:en"]}, "search.mixture.parts[1]: 'mono:en': name each part once"),
        ({**OPTUNA, "parts": ["mono:en", "mono:qq"]}, "search.mixture.parts[1]: 'qq': not an ISO 639 code"),
        ({**OPTUNA, "parts": "mono:en"}, "search.mixture.parts: 'mono:en': must be a list"),
        ({"searcher": "optuna"}, "search.mixture.parts: missing required key"),
        ({**OPTUNA, "evaluate": 25}, "search.mixture.evaluate: 25: is more than the 24 trials"),
        ({**OPTUNA, "trials": 0}, "search.mixture.trials: 0: must be greater than or equal to 1"),
        ({**OPTUNA, "objective": "best"}, "search.mixture.objective: 'best': must be 'mean' or 'worst'"),
        ({**OPTUNA, "combination": "power"}, "search.mixture.combination: 'power': power needs a number"),
        ({**OPTUNA, "eta": 6}, "search.mixture.eta: 6: unknown key; searcher optuna has parts, combination"),
        ({**MINIMAX, "trials": 6}, "search.mixture.trials: 6: unknown key; searcher minimax has parts"),
        ({**MINIMAX, "eta": 0}, "search.mixture.eta: 0: must be greater than 0"),
        ({**MINIMAX, "eta": math.inf}, "search.mixture.eta: inf: must be a finite number"),
        ({**MINIMAX, "rounds": 0}, "search.mixture.rounds: 0: must be greater than or equal to 1"),
        (
            {**MINIMAX, "parts": ["mono:en", "mono:sw"]},
            "search.mixture.parts[1]: 'mono:sw': minimax needs the loss",
        ),
        ({**MINIMAX, "parts": ["mono:en", "code"]}, "search.mixture.parts[1]: 'code': minimax needs a language"),
        (
            {**MINIMAX, "parts": ["translation:en-fr", "translation:fr-en"]},
            "search.mixture.parts[0]: 'translation:en-fr': minimax needs a language that this part has",
        ),
        ({**OPTUNA, "searcher": "grid"}, "search.mixture.searcher: 'grid': write optuna or minimax"),
        ({"parts": PARTS}, "search.mixture.searcher: None: write optuna or minimax"),
        ([3], "search.mixture: 3: must be a section of keys, or a list of such sections"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_line(mixture: Any, expected: str) -> None:
    told = refusal(mixture=mixture)
    assert told.startswith(expected)
    assert "\n" not in told
    if isinstance(mixture, dict):
        assert refusal(mixture=[MINIMAX, mixture]) == told


def test_the_language_of_each_part() -> None:
    def languages(*parts: str) -> tuple[str, ...]:
        (mixture,) = spec(mixture={**MINIMAX, "parts": parts}).search.mixture
        assert isinstance(mixture, MinimaxMixture)
        return mixture.languages(["en", "fr", "de"])

    assert languages("mono:fr", "mono:en") == ("fr", "en")
    assert languages("mono:en", "translation:en-fr", "translation:de-en") == ("en", "fr", "de")
    assert languages("translation:en-fr", "translation:en-de") == ("fr", "de")


# pretraining


def test_weights_follow_the_shares_in_pretraining() -> None:
    made = spec(pretraining={"en": 0.9, "fr": 0.06, "de": 0.04}, calibration=["pretraining:mono:fr,mono:en"])
    assert [str(one) for one in made.search.calibration] == ["mix:mono:en=0.9375,mono:fr=0.0625"]
    equal = spec(pretraining={"en": 7, "fr": 7, "de": 7}, calibration=["pretraining:mono:fr,mono:en,mono:de"])
    assert equal.search.calibration == (Calibration.parse("mix:mono:en,mono:fr,mono:de"),)
    uneven = spec(pretraining={"en": 1, "fr": 1, "de": 5}, calibration=["pretraining:mono:fr,mono:en,mono:de"])
    assert sum(weight for _, weight in uneven.search.calibration[0].parts) == 1


@pytest.mark.parametrize(
    ("table", "calibration", "expected"),
    [
        (None, "pretraining:mono:en,mono:fr", "search.pretraining: pretraining:mono:en,mono:fr needs each"),
        ({"en": 1}, "pretraining:mono:en,mono:fr", f"{FIRST}'pretraining:mono:en,mono:fr': search.pretr"),
        ({"en": 1}, "pretraining:mono:en,mono:en", f"{FIRST}'pretraining:mono:en,mono:en': name each part once"),
        ({"en": 1}, "pretraining:code", f"{FIRST}'pretraining:code': a share is that of one language"),
        ({"en": 1, "fr": 1e-8}, "pretraining:mono:en,mono:fr", f"{FIRST}'pretraining:mono:en,mono:fr': the share"),
        ({"en": 1}, "pretraining:mono:qq", f"{FIRST}'qq': not an ISO 639 code"),
        ({"en": -1}, "mono:en", "search.pretraining.en: -1: must be a number greater than 0"),
        ({"en": "x"}, "mono:en", "search.pretraining.en: 'x': must be a number greater than 0"),
        ({"qq": 1}, "mono:en", "search.pretraining: 'qq': not an ISO 639 code"),
        ([1], "mono:en", "search.pretraining: [1]: must be a section of languages and shares"),
        ({}, "mono:en", "search.pretraining: {}: must be a section of languages and shares"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_the_shares_is_answered(table: Any, calibration: str, expected: str) -> None:
    told = refusal(pretraining=table, calibration=[calibration])
    assert told.startswith(expected)
    assert "\n" not in told


# which searches there are


def test_each_kind_of_trial_that_reads_one_calibration_has_a_search() -> None:
    contrast = {"contrastive": {"keep": "mono:en", "against": "mono:fr"}}
    made = spec(
        score=["wanda", "magnitude", contrast, "sparsegpt"],
        sparsity=[0.5, 0.6],
        pattern=["unstructured", "2:4"],
        seed=[0, 3],
        mixture=[OPTUNA, MINIMAX],
    )
    searches = mixture_searches(made.search, 0)
    assert [one.equal.label for one in searches[: len(searches) // 2]] == [
        "wanda 0.5 mix:mono:de+en+fr",
        "wanda 2:4 mix:mono:de+en+fr",
        "wanda 0.6 mix:mono:de+en+fr",
        "sparsegpt 0.5 mix:mono:de+en+fr sequential",
        "sparsegpt 2:4 mix:mono:de+en+fr sequential",
        "sparsegpt 0.6 mix:mono:de+en+fr sequential",
    ]
    assert len(forecast_trials(searches)) == 6 * 24 * 2
    assert len(evaluated_trials(searches)) == 6 * 2 * 2 + 6 * 5 * 2
    assert {trial.seed for trial in evaluated_trials(searches)} == {0, 3}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"score": ["magnitude"]}, "search.score: [magnitude]: none reads the mixtures of search.mixture"),
        (
            {"score": ["sparsegpt"], "mixture": {**OPTUNA, "combination": "max"}},
            "search.mixture.combination: 'max': sparsegpt reads products of channels, which only mix combines",
        ),
    ],
)  # fmt: skip
def test_a_score_that_reads_no_mixture_is_refused(search: dict[str, Any], expected: str) -> None:
    made = spec(**{"mixture": OPTUNA, **search})
    with pytest.raises(SpecError) as caught:
        mixture_searches(made.search, 0)
    assert str(caught.value).startswith(expected)


# the stages

WORST = {"en": 0.20, "fr": 0.30, "de": 0.40}  # at weight 0


def harm(variant: Variant, language: str) -> float:
    if variant.calibration is None:
        return 0.6
    weights = {part.languages[0]: float(weight) for part, weight in variant.calibration.parts}
    return variant.sparsity * WORST[language] * (1 - 0.5 * weights.get(language, 0.0)) + 0.001 * variant.seed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    """A plan whose spec is replaced in part by `planned`: preparing it takes seconds."""
    values = {
        "model": {"path": str(source().folder)},
        "calibration": {"samples": 4, "shots": 2, "max_tokens": 64},
        "search": {**SEARCH, "seed": [0, 1], "mixture": [OPTUNA, MINIMAX]},
        "evaluation": {"perplexity": {"lines": 16, "confirmation_lines": 2}},
        "storage": str(tmp_path_factory.mktemp("base")),
    }
    made = parse_spec(values)
    variants = select_variants(made.search, made.calibration.seed)
    searches = mixture_searches(made.search, made.calibration.seed)
    return SweepPlan(prepare(made, variants, searches=searches), variants, (), searches=searches)


def planned(base: SweepPlan, storage: Path, mixture: Any = None, **search: Any) -> SweepPlan:
    made = base.prepared.spec
    section = made.search.model_copy(update=search)
    if mixture is not None:
        section = section.model_copy(update={"mixture": spec(mixture=mixture).search.mixture})
    prepared = replace(base.prepared, spec=made.model_copy(update={"storage": str(storage), "search": section}))
    searches = mixture_searches(section, made.calibration.seed)
    return replace(base, prepared=prepared, variants=select_variants(section, 0), searches=searches)


def verdict_of(
    plan: SweepPlan, harmed: Callable[[Variant, str], float] = harm, **options: Any
) -> tuple[Verdict, LocalRunner]:
    runner = LocalRunner(plan, TextModel(plan.prepared, harmed, noise=0.001), **options)
    return run_stages(plan, runner), runner


def ran(runner: LocalRunner, purpose: Purpose) -> list[Variant]:
    return [variant for one, variant in runner.ran if one is purpose and variant]


def worst_forecast(variant: Variant) -> float:
    return max(harm(variant.without_seed, code) + 0.0005 for code in WORST) / 10


def test_optuna_evaluates_the_mixtures_with_the_best_forecasts(base: SweepPlan, tmp_path: Path) -> None:
    verdict, runner = verdict_of(planned(base, tmp_path, OPTUNA))
    forecast = ran(runner, Purpose.SCREEN)
    tried = list(dict.fromkeys(one.without_seed for one in forecast))
    assert len(tried) == 24
    assert len(forecast) == 48
    assert [one.calibration_text for one in tried[:4]] == ["mix:mono:de,mono:en,mono:fr", *PARTS]
    best = sorted(tried, key=worst_forecast)[:2]
    found = [one for one in ran(runner, Purpose.SELECT) if one.calibration and len(one.calibration.parts) > 1]
    assert sorted(map(str, found)) == sorted(str(replace(one, seed=seed)) for one in best for seed in (0, 1))
    assert worst_forecast(best[0]) < 0.9 * worst_forecast(tried[0]), "better than equal weights"
    assert worst_forecast(best[0]) < 1.06 * 0.0138, "near the optimum, where all languages lose the same"
    assert runner.totals == {"searching mixtures": [48] * 3}
    assert runner.counts == {"searching mixtures": [20, 40, 48]}
    assert {one.variant for one in verdict.ranking} == {one.without_seed for one in ran(runner, Purpose.SELECT)}


def test_mixtures_that_were_only_forecast_are_logged_and_not_ranked(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, OPTUNA)
    verdict, runner = verdict_of(plan)
    evaluated = set(ran(runner, Purpose.SELECT))
    assert {one.result.variant for one in verdict.unfinished} == set(ran(runner, Purpose.SCREEN)) - evaluated
    for one in verdict.unfinished:
        assert (one.standing, one.items) == (Standing.SCREENED, ())
        assert one.result.key == plan.prepared.result_key(one.result.variant)
        assert one.result.metrics["forecast.worst"] > 0


def test_minimax_moves_weights_to_the_languages_that_lose_most(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, {**MINIMAX, "rounds": 12})
    verdict, runner = verdict_of(plan)
    dense = plan.prepared.result_store().load(plan.prepared.result_key(None))
    assert dense is not None
    losses = {
        entry.variant.calibration_text: loss_metrics(entry.metrics, dense.metrics) for entry in verdict.ranking
    }
    rounds = list(dict.fromkeys(one.calibration_text for one in ran(runner, Purpose.SELECT)[:24]))
    weights = np.full(3, 1 / 3)
    for text in rounds:
        assert text is not None
        expected = rounded(weights.tolist(), 3)
        assert Calibration.parse(text) == Calibration.parse(written(expected))
        loss = np.array([losses[text][f"loss.{code}"] for code in WORST])
        weights = weights * np.exp(6 * (loss - loss.mean()))
        weights /= weights.sum()
    first, last = losses[rounds[0]], losses[rounds[-1]]
    assert last["loss.worst"] < first["loss.worst"] - 0.01
    assert ran(runner, Purpose.SCREEN) == []
    assert runner.totals == {"searching mixtures": [24] * 12}


def written(weights: Sequence[Fraction]) -> str:
    if len(set(weights)) == 1:
        return f"mix:{','.join(PARTS)}"
    return "mix:" + ",".join(f"{part}={float(weight)}" for part, weight in zip(PARTS, weights, strict=True))


def test_all_searches_of_a_kind_run_together(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, [MINIMAX, {**MINIMAX, "parts": PARTS[:2], "rounds": 3}], sparsity=(0.5, 0.7))
    _, runner = verdict_of(plan)
    assert runner.totals == {"searching mixtures": [(5 + 3) * 2 * 2] * 5}
    assert runner.counts["searching mixtures"] == [8, 16, 24, 28, 32]


def test_the_same_searches_again_run_nothing(base: SweepPlan, tmp_path: Path) -> None:
    first, runner = verdict_of(planned(base, tmp_path))
    again, second = verdict_of(planned(base, tmp_path))
    assert second.ran == []
    assert second.counts == runner.counts
    assert [entry.key for entry in again.ranking] == [entry.key for entry in first.ranking]


@pytest.mark.parametrize(
    "search", [{}, {"racing": True, "screen": 1}, {"searcher": "optuna", "samples": 2, "seed": (0,)}], ids=str
)
def test_the_verdict_is_the_same_wherever_the_driver_dies(
    search: dict[str, Any], base: SweepPlan, tmp_path: Path
) -> None:
    expected, undisturbed = verdict_of(planned(base, tmp_path / "undisturbed", **search))
    trials: list[Any] = []
    while True:
        plan = planned(base, tmp_path / "killed", **search)
        runner = LocalRunner(plan, TextModel(plan.prepared, harm, noise=0.001), dies=17)
        try:
            verdict = run_stages(plan, runner)
        except KilledError:
            trials += runner.ran
            continue
        break
    assert [*trials, *runner.ran] == undisturbed.ran, "a finished trial ran again, or another one"
    assert state(verdict) == state(expected)
    assert len(trials) >= 2 * 17


def state(verdict: Verdict) -> Any:
    ranking = [(one.key, one.standing, one.lines, lasting(one.metrics), one.confirmed) for one in verdict.ranking]
    unfinished = [(one.result.key, one.standing) for one in verdict.unfinished]
    return repr((ranking, unfinished))


def test_the_choices_depend_on_the_losses(base: SweepPlan, tmp_path: Path) -> None:
    """So an interrupted search that read other results would be noticed above."""

    def turned(variant: Variant, language: str) -> float:
        return 0.5 - harm(variant, language)

    for mixture, purpose in ((OPTUNA, Purpose.SCREEN), (MINIMAX, Purpose.SELECT)):
        _, plain = verdict_of(planned(base, tmp_path / f"plain {purpose}", mixture))
        _, other = verdict_of(planned(base, tmp_path / f"turned {purpose}", mixture), turned)
        assert ran(plain, purpose)[0] == ran(other, purpose)[0]
        assert ran(plain, purpose) != ran(other, purpose)


def test_mixtures_join_the_race_and_are_not_screened(base: SweepPlan, tmp_path: Path) -> None:
    """Screening keeps one trial of the grid at each sparsity; a mixture that it drops may be found again."""
    verdict, runner = verdict_of(planned(base, tmp_path, racing=True, screen=1))
    ranked = {entry.variant.label: entry for entry in verdict.ranking}
    assert ranked["wanda 0.5 mono:en"].standing is Standing.SCREENED
    minimax = ran(runner, Purpose.SELECT)
    assert len({one.without_seed for one in minimax}) == 5
    assert all(one.without_seed.label in ranked for one in minimax)
    blocks = {one.without_seed for one in ran(runner, Purpose.BLOCK)}
    assert not blocks & {one.without_seed for one in minimax}, "a whole result needs no block"
    assert len(blocks) == 1 + 1 + 2, "of the grid, the baseline, and what Optuna chose"
    keys = [one.result.key for one in verdict.unfinished]
    assert len(set(keys)) == len(keys)


def test_a_mixture_that_is_screened_in_the_grid_and_then_found_is_ranked_once(
    base: SweepPlan, tmp_path: Path
) -> None:
    """Text of one language is a corner of the simplex, which is always forecast."""
    mixture = {**OPTUNA, "trials": 4, "evaluate": 4}
    verdict, _ = verdict_of(planned(base, tmp_path, mixture, screen=1))
    labels = [entry.variant.label for entry in verdict.ranking]
    assert len(set(labels)) == len(labels) == 5
    assert {entry.standing for entry in verdict.ranking} == {Standing.EVALUATED}
    assert verdict.unfinished == ()


def test_a_failed_mixture_ends_its_minimax_search_and_no_other(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, MINIMAX, sparsity=(0.5, 0.7))
    equal = plan.searches[1].equal
    broken = [replace(equal, seed=seed) for seed in (0, 1)]
    _, runner = verdict_of(plan, broken=broken)
    assert runner.failed.keys() == set(broken)
    mixtures = [one for one in ran(runner, Purpose.SELECT) if one.calibration and len(one.calibration.parts) > 1]
    assert {one.sparsity for one in mixtures} == {0.5}
    assert len(mixtures) == 10


def test_a_failed_forecast_is_not_evaluated(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, OPTUNA)
    broken = [replace(plan.searches[0].equal, seed=seed) for seed in (0, 1)]
    verdict, _ = verdict_of(plan, broken=broken)
    assert not {one.variant for one in verdict.ranking} & {broken[0]}
    assert not {one.result.variant for one in verdict.unfinished} & set(broken)


def test_without_finite_losses_minimax_ends(base: SweepPlan, tmp_path: Path) -> None:
    def destroyed(variant: Variant, language: str) -> float:
        return math.nan if language == "de" else harm(variant, language)

    _, runner = verdict_of(planned(base, tmp_path, MINIMAX), destroyed)
    mixtures = [one for one in ran(runner, Purpose.SELECT) if one.calibration and len(one.calibration.parts) > 1]
    assert len(mixtures) == 2


def test_the_plan_counts_what_the_searches_add(base: SweepPlan, tmp_path: Path) -> None:
    plan = planned(base, tmp_path)
    assert plan.passes == {
        "calibration": 3 * 2,  # English, French and German text of two seeds, also for forecasts
        "sequential pruning (two forwards each)": 0,
        "masks of mixtures, for forecasts, at most": 24 * 2,
        "evaluation, at most": 1 + 5 + 2 * 2 + 5 * 2,
    }
    plain = planned(base, tmp_path, ())
    assert plain.passes.keys() == {"calibration", "sequential pruning (two forwards each)", "evaluation"}
    assert plan.disk > plain.disk
