"""The ranking of trials: hand-made items, grouping of seeds, tests against the best, and what comes last."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from mlprune.evaluation.estimates import estimate
from mlprune.evaluation.items import from_json, to_json
from mlprune.evaluation.loss import LOSS, loss_metrics, objective_samples, shared_items
from mlprune.evaluation.resampling import clusters
from mlprune.evaluation.significance import holm
from mlprune.spec.variants import Variant
from mlprune.sweep.ranking import RankedVariant, Standing, Trial, difference, rank_trials, read_items
from mlprune.sweep.trial import trial_metrics
from tests.runs import choice, names
from tests.trials import DE, DENSE, EN, ES, FR, LINES, MAGNITUDE, seeds_of, texts, trial, variant


def ranked(*trials: Trial, metric: str = "loss.mean", dense: Trial = DENSE) -> list[RankedVariant]:
    """Rank the trials, and check that their order does not matter."""
    ranking = rank_trials(trials, dense, metric)
    shuffled = rank_trials(random.Random(len(trials)).sample(trials, len(trials)), dense, metric)
    assert [plain(entry) for entry in shuffled] == [plain(entry) for entry in ranking]
    return list(ranking)


def plain(entry: RankedVariant) -> Any:
    return repr((entry.result, entry.standing, entry.lines, entry.loss, entry.to_best, entry.tied))


def variants_of(ranking: Sequence[RankedVariant]) -> list[Variant]:
    return [entry.variant for entry in ranking]


def test_losses_by_hand_rank_and_not_bits_per_byte() -> None:
    """Every line loses the same share: 10% and 30% of English and French on average lose to 25% and 5%."""
    (first, second) = ranked(trial(EN, texts([0.1, 0.3])), trial(FR, texts([0.25, 0.05])))
    assert variants_of([first, second]) == [FR, EN]
    wanted = {"loss.en": 0.25, "loss.fr": 0.05, "loss.mean": 0.15, "loss.worst": 0.25}
    assert {name: first.metrics[name] for name in wanted} == pytest.approx(wanted)
    assert first.loss is not None
    assert first.loss.value == pytest.approx(first.metrics["loss.mean"], abs=1e-12)
    assert (first.to_best, first.is_best, first.tied) == (None, True, False)
    assert second.to_best is not None
    assert second.to_best.value == pytest.approx(0.05)
    assert not second.is_best
    assert (first.lines, second.lines) == (LINES, LINES)
    assert first.key == FR.key
    assert first.result.digest == f"masks of {FR.key}"


def test_by_the_worst_language_another_one_is_best() -> None:
    """English loses least on average, French has the lesser largest loss."""
    trials = [trial(EN, texts([0.0, 0.3], 0.02, 1)), trial(FR, texts([0.2, 0.2], 0.02, 2))]
    assert variants_of(ranked(*trials)) == [EN, FR]
    first, second = ranked(*trials, metric="loss.worst")
    assert variants_of([first, second]) == [FR, EN]
    assert first.loss is not None
    assert second.to_best is not None
    assert first.loss.value == pytest.approx(first.metrics["loss.worst"], abs=1e-12)
    assert first.metrics["loss.worst"] == max(first.metrics["loss.en"], first.metrics["loss.fr"])
    change = second.metrics["loss.worst"] - first.metrics["loss.worst"]
    assert second.to_best.value == pytest.approx(change, abs=1e-12)
    assert (second.tied, second.to_best.low > 0) == (False, True)


def test_of_a_task_the_highest_is_best_and_the_loss_stays_the_mean() -> None:
    right = [[1] * 30, [1, 0] * 15, [0] * 30]
    trials = [
        trial(one, [*texts([0.1 * place, 0.1], 0.01, place), choice(answers)])
        for place, (one, answers) in enumerate(zip((DE, EN, FR), reversed(right), strict=True))
    ]
    dense = trial(None, [*texts([0, 0]), choice([1] * 30)])
    ranking = ranked(*trials, metric="xnli.fr", dense=dense)
    assert variants_of(ranking) == [FR, EN, DE]
    assert [entry.metrics["xnli.fr"] for entry in ranking] == [1.0, 0.5, 0.0]
    assert [entry.to_best.value if entry.to_best else None for entry in ranking] == [None, -0.5, -1.0]
    for entry in ranking:
        assert entry.loss is not None
        assert entry.loss.value == pytest.approx(entry.metrics["loss.mean"], abs=1e-12)


def test_seeds_are_one_entry_with_their_means() -> None:
    losses = {0: 0.30, 1: 0.10, 2: 0.20}
    trials = [trial(one, texts([losses[one.seed]] * 2, 0.01, one.seed)) for one in seeds_of(EN, 2, 0, 1)]
    better = [trial(one, texts([0.15, 0.15], 0.01, 7 + one.seed)) for one in seeds_of(FR, 0, 1, 2)]
    first, second = ranked(*trials, *better)
    assert variants_of([first, second]) == [FR, EN]
    assert [result.variant for result in second.seeds] == seeds_of(EN, 0, 1, 2)
    assert second.result.variant == EN
    assert second.key == EN.key
    own = [loss_metrics(one.result.metrics, DENSE.result.metrics)["loss.mean"] for one in trials]
    assert second.metrics["loss.mean"] == pytest.approx(sum(own) / 3, abs=1e-15)
    assert [result.metrics["loss.mean"] for result in second.seeds] == [own[1], own[2], own[0]]
    for name in ("bits_per_byte.fr", "perplexity.en", "forecast.mean", "loss.worst"):
        assert second.metrics[name] == pytest.approx(sum(result.metrics[name] for result in second.seeds) / 3)
    assert second.loss is not None
    assert second.loss.value == pytest.approx(second.metrics["loss.mean"], abs=1e-15)
    assert second.loss.high - second.loss.low > 0.1, "the interval accounts for the seeds"


def test_seeds_are_paired() -> None:
    """Seed by seed one variant is better by about 1%. Between seeds the losses differ by much more."""
    level = {0: 0.1, 1: 0.3, 2: 0.6}
    better = [trial(one, texts([level[one.seed]] * 2)) for one in seeds_of(EN, 0, 1, 2)]
    worse = [trial(one, texts([level[one.seed] + 0.01 + one.seed / 1e4] * 2)) for one in seeds_of(FR, 2, 1, 0)]
    _, second = ranked(*better, *worse)
    assert second.to_best is not None
    assert second.to_best.value == pytest.approx(0.0101)
    assert second.to_best.high - second.to_best.low < 0.001
    assert not second.tied


def test_a_variant_without_seeds_is_compared_with_every_seed_of_another() -> None:
    losses = {0: 0.1, 1: 0.2, 2: 0.6}
    seeded = [trial(one, texts([losses[one.seed]] * 2)) for one in seeds_of(EN, 0, 1, 2)]
    single = trial(MAGNITUDE, texts([0.2, 0.2]))
    first, second = ranked(*seeded, single)
    assert variants_of([first, second]) == [MAGNITUDE, EN]
    assert second.to_best is not None
    assert second.to_best.value == pytest.approx(0.1), "not only the seed 0"
    turned = difference([single], seeded, DENSE, "loss.mean")
    assert (turned.value, turned.p) == (-second.to_best.value, second.to_best.p)


def test_of_failed_trials_the_seeds_that_both_have_are_compared() -> None:
    level = {0: 0.1, 1: 0.3, 2: 0.6}
    a = [trial(one, texts([level[one.seed]] * 2)) for one in seeds_of(EN, 0, 1, 2)]
    b = [trial(one, texts([level[one.seed] + 0.01] * 2)) for one in seeds_of(FR, 2, 1)]
    one = difference(b, a, DENSE, "loss.mean")
    assert one.value == pytest.approx(0.01)
    ranking = ranked(*a, *b)
    assert variants_of(ranking) == [EN, FR]
    assert len(ranking[1].seeds) == 2
    alone = difference(b[:1], a, DENSE, "loss.mean")
    assert alone.value == pytest.approx(0.61 - 1 / 3), "a single one is compared with all"
    assert math.isfinite(difference(seeds_trials(EN, 0, 1), seeds_trials(FR, 2, 3), DENSE, "loss.mean").value)


def seeds_trials(one: Variant, *seeds: int) -> list[Trial]:
    return [trial(own, texts([0.1 * own.seed] * 2)) for own in seeds_of(one, *seeds)]


@pytest.mark.parametrize("metric", ["loss.mean", "loss.worst", "loss.fr", "bits_per_byte.fr"])
def test_differences_are_estimates_of_paired_samples_and_holm_is_within_a_sparsity(metric: str) -> None:
    """Every number from the plain functions. Differences are small, so that corrections decide."""
    steps = {0.5: 0.002, 0.7: 0.004}
    trials = {
        one: trial(one, texts([sparsity + step * place] * 2, 0.015, place))
        for sparsity, step in steps.items()
        for place, code in enumerate(("en", "fr", "de", "es", "sw"))
        for one in [variant(f"mono:{code}", sparsity=sparsity)]
    }
    ranking = ranked(*trials.values(), metric=metric)
    values = [entry.metrics[metric] for entry in ranking]
    assert values == sorted(values)
    decisions = set()
    for sparsity in steps:
        best, *others = [entry for entry in ranking if entry.variant.sparsity == sparsity]
        assert best.is_best
        samples = {e.key: objective_samples(trials[e.variant].items, DENSE.items, metric) for e in (best, *others)}
        units = clusters(DENSE.items, [metric])
        expected = [estimate([samples[e.key] - samples[best.key]], units) for e in others]
        for entry, one, p in zip(others, expected, holm([one.p for one in expected]), strict=True):
            assert entry.to_best is not None
            assert vars(entry.to_best) == pytest.approx(vars(one), abs=1e-12)
            assert entry.tied == (p >= 0.05)
            decisions.add((entry.tied, one.p < 0.05))
    assert {(False, True), (True, False)} <= decisions
    if metric == "loss.mean":
        assert (True, True) in decisions, "no difference that only the correction makes a tie"


def test_each_sparsity_has_its_best() -> None:
    harms = {0.3: (0.05, 0.04), 0.5: (0.2, 0.3), 0.7: (0.9, 0.8)}
    trials = [
        trial(variant(f"mono:{code}", sparsity=sparsity), texts([harm, harm], 0.001, 1))
        for sparsity, pair in harms.items()
        for code, harm in zip(("en", "fr"), pair, strict=True)
    ]
    best = [entry.variant for entry in ranked(*trials) if entry.is_best]
    assert best == [variant("mono:fr", sparsity=0.3), EN, variant("mono:fr", sparsity=0.7)]


@pytest.mark.parametrize("metric", ["loss.mean", "loss.worst", "bits_per_byte.mean"])
def test_nan_comes_last_and_is_no_tie(metric: str) -> None:
    """A comparison with it does not count in the correction of the others."""
    trials = [
        trial(FR, texts([math.nan, 0.1])),
        trial(DE, texts([0.1, math.inf])),
        trial(ES, texts([5.05, 5.05], 0.3, 2)),
        trial(EN, texts([5.0, 5.0], 0.3, 1)),
    ]
    ranking = ranked(*trials, metric=metric)
    assert variants_of(ranking) == [EN, ES, DE, FR]
    assert [entry.tied for entry in ranking] == [False, True, False, False]
    assert [entry.is_best for entry in ranking] == [True, False, False, False]
    assert math.isnan(ranking[3].metrics[metric])
    assert [vars(entry.to_best) for entry in ranked(trials[2], trials[3], metric=metric) if entry.to_best] == [
        vars(ranking[1].to_best)
    ]


def test_the_only_trial_may_be_nan() -> None:
    (entry,) = ranked(trial(EN, texts([math.nan, 0.1])))
    assert entry.is_best
    assert entry.loss is not None
    assert math.isnan(entry.loss.value)


def test_dropped_and_screened_variants_follow_in_the_order_of_what_is_known() -> None:
    """The dropped ones by lines and then by loss, of their own lines; the screened ones by the forecast."""
    first = [part.select(names(LINES)[:8]) for part in texts([0.0, 0.0])]
    more = [part.select(names(LINES)[:24]) for part in texts([0.5, 0.5])]
    less = [part.select(names(LINES)[:8]) for part in texts([0.9, 0.9])]
    screened = {f"mono:{code}": value for code, value in (("sw", 0.3), ("hi", 0.1), ("zh", 0.2))}
    ranking = ranked(
        *(
            trial(variant(code), [], Standing.SCREENED, **{"forecast.worst": value, "forecast.mean": 1 - value})
            for code, value in screened.items()
        ),
        trial(FR, less, Standing.DROPPED),
        trial(DE, first, Standing.DROPPED),
        trial(EN, texts([0.7, 0.7])),
        trial(ES, more, Standing.DROPPED),
        metric="loss.worst",
    )
    assert variants_of(ranking) == [EN, ES, DE, FR, *(variant(f"mono:{code}") for code in ("hi", "zh", "sw"))]
    assert [entry.standing.name for entry in ranking] == ["EVALUATED", *["DROPPED"] * 3, *["SCREENED"] * 3]
    assert [entry.lines for entry in ranking] == [LINES, 24, 8, 8, 0, 0, 0]
    losses = [entry.metrics["loss.mean"] for entry in ranking[:4]]
    assert losses == pytest.approx([0.7, 0.5, 0.0, 0.9], abs=1e-12)
    assert [entry.loss is None for entry in ranking] == [False] * 4 + [True] * 3
    assert [entry.to_best is None for entry in ranking] == [True, *[False] * 3, *[True] * 3]
    assert [entry.is_best for entry in ranking] == [True, *[False] * 6]
    assert not any(entry.tied for entry in ranking)
    assert not any(name.startswith(LOSS) for name in ranking[-1].metrics)


def test_a_dropped_variant_is_compared_on_its_own_lines() -> None:
    run = texts([0.3, 0.2], 0.1, 5)
    judged = [part.select(names(LINES)[:16]) for part in run]
    best = trial(EN, texts([0.1, 0.1], 0.05, 6))
    _, second = ranked(best, trial(FR, judged, Standing.DROPPED))
    own, reference, dense = shared_items(judged, best.items, DENSE.items)
    samples = [objective_samples(items, dense, "loss.mean") for items in (own, reference)]
    assert second.to_best is not None
    assert vars(second.to_best) == pytest.approx(vars(estimate(samples[:1], 8, samples[1:])), abs=1e-12)
    expected = loss_metrics(trial_metrics(judged), trial_metrics(dense))
    assert {name: second.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_without_an_evaluated_variant_nothing_is_best() -> None:
    (entry,) = ranked(trial(EN, [], Standing.SCREENED))
    assert (entry.is_best, entry.tied, entry.loss, entry.to_best) == (False, False, None, None)


def test_a_loss_reads_likelihoods_alone() -> None:
    text = to_json([*texts([0, 0]), choice([1, 0])])
    assert [part.kind for part in read_items(text, "loss.worst")] == ["likelihood"] * 2
    assert read_items(text, "xnli.fr") == from_json(text)
