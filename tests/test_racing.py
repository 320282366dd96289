"""Races: which variants are dropped after a block, by hand. Whole races are in `test_verdict`."""

import math
import random

import pytest

from mlprune.evaluation.significance import holm
from mlprune.spec.variants import Variant
from mlprune.sweep.racing import to_drop
from mlprune.sweep.ranking import Trial, difference
from tests.runs import names
from tests.trials import DE, DENSE, EN, ES, FR, seeds_of, texts, trial, variant

CODES = ("fr", "de", "es", "hi", "sw", "ru", "ar", "ja", "ko", "vi", "th", "tr", "zh", "it", "pt", "nl")


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


def test_seeds_of_a_variant_are_dropped_together() -> None:
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
