"""The lists of a search to trials in canonical form."""

import json
from typing import Any, get_args

import pytest

from mlprune.errors import SpecError
from mlprune.pruning.scores import SCORES
from mlprune.spec.calibrations import Demonstration
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Allocation, Propagation, Scoring, Variant
from mlprune.sweep.grid import needs_dense_moments, parse_variant, variants_of
from mlprune.sweep.plan import select_variants


def search(**keys: Any) -> Any:
    return parse_spec({"search": {"score": ["wanda"], "sparsity": [0.5], **keys}}).search


def labels(**keys: Any) -> list[str]:
    return [variant.label for variant in variants_of(search(**keys))]


CONTRAST = {"contrastive": {"keep": "translation:en-fr", "against": "code"}}


def test_a_grid_is_the_product_of_its_lists_each_different_trial_once() -> None:
    assert labels(
        calibration=["mono:en", "code"],
        score=["magnitude", "wanda", "wanda-alpha", "sparsegpt", CONTRAST],
        pattern=["unstructured", "2:4"],
        propagation=["dense", "sequential"],
    ) == [
        "magnitude 0.5",
        "magnitude 2:4",
        "wanda 0.5 mono:en",
        "wanda 0.5 mono:en sequential",
        "wanda 2:4 mono:en",  # wanda-alpha is the same in groups
        "wanda 2:4 mono:en sequential",
        "wanda-alpha 0.5 mono:en",
        "wanda-alpha 0.5 mono:en sequential",
        "sparsegpt 0.5 mono:en sequential",
        "sparsegpt 2:4 mono:en sequential",
        "contrastive 0.5 translation:en-fr/code",
        "contrastive 0.5 translation:en-fr/code sequential",
        "contrastive 2:4 translation:en-fr/code",
        "contrastive 2:4 translation:en-fr/code sequential",
        "wanda 0.5 code",
        "wanda 0.5 code sequential",
        "wanda 2:4 code",
        "wanda 2:4 code sequential",
        "wanda-alpha 0.5 code",
        "wanda-alpha 0.5 code sequential",
        "sparsegpt 0.5 code sequential",
        "sparsegpt 2:4 code sequential",
    ]


def test_seeds_are_an_axis_and_a_trial_without_one_runs_once() -> None:
    """Without an axis, the seed is that of the calibration."""
    grid = {"calibration": ["mono:en"], "score": ["magnitude", "wanda", "random"], "propagation": ["dense"]}
    assert labels(**grid, seed=[2, 0]) == [
        "magnitude 0.5",
        "wanda 0.5 mono:en seed 2",
        "wanda 0.5 mono:en",
        "random 0.5 seed 2",
        "random 0.5",
    ]
    assert [variant.seed for variant in variants_of(search(**grid), 4)] == [0, 4, 4]


def test_samples_are_variants_with_all_their_seeds() -> None:
    calibrations = ["mono:en", "mono:fr", "code"]
    grid = {"calibration": calibrations, "sparsity": [0.3, 0.5, 0.7], "score": ["wanda", "magnitude"]}
    section = search(**grid, seed=[3, 1], samples=6)
    whole, drawn = variants_of(section), select_variants(section, 0)
    assert len({variant.without_seed for variant in drawn}) == 6
    for variant in drawn:
        own = [one for one in drawn if one.without_seed == variant.without_seed]
        assert own == [one for one in whole if one.without_seed == variant.without_seed]
        assert [one.seed for one in own] == ([3, 1] if variant.sides else [0])
    assert select_variants(section, 0) == drawn != select_variants(section, 1)
    assert select_variants(search(**grid, seed=[3, 1], samples=12), 0) == whole
    optuna = search(**grid, samples=4, searcher="optuna")
    assert select_variants(optuna, 5) == variants_of(optuna, 5), "all that it may choose from"


def test_allocation_needs_a_calibration_where_the_score_does_not_and_no_pattern() -> None:
    assert labels(
        calibration=["mono:en"],
        score=["random", "wanda"],
        allocation=["uniform", "owl"],
        pattern=["unstructured", "2:4"],
    ) == [
        "random 0.5",
        "random 0.5 mono:en owl",
        "random 2:4",
        "wanda 0.5 mono:en sequential",
        "wanda 0.5 mono:en owl sequential",
        "wanda 2:4 mono:en sequential",
    ]


def test_allocations_that_read_no_calibration_need_none() -> None:
    keys = {"score": ["magnitude", "random"], "allocation": ["alpha", "sensitivity-worst"], "seed": [1, 2]}
    assert labels(**keys, calibration=["mono:en", "mono:fr"]) == [
        "magnitude 0.5 alpha",
        "magnitude 0.5 sensitivity-worst",
        "random 0.5 alpha seed 1",
        "random 0.5 alpha seed 2",
        "random 0.5 sensitivity-worst seed 1",
        "random 0.5 sensitivity-worst seed 2",
    ]


@pytest.mark.parametrize(
    "score", [name for name in SCORES if name != "contrastive"] + ["contrastive:mono:fr/code"]
)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("propagation", ["dense", "sequential"])
@pytest.mark.parametrize("allocation", get_args(Allocation))
def test_a_trial_in_canonical_form_stays_what_it_is(
    score: str, pattern: str, propagation: Propagation, allocation: Allocation
) -> None:
    made = parse_variant("mono:en", score, 0.3, pattern, propagation, allocation)
    assert parse_variant(**made.to_dict()) == made
    assert Variant.from_dict(made.to_dict()) == made
    assert Variant.from_dict(json.loads(json.dumps(made.to_dict()))).key == made.key
    if made.propagation == "sequential" and made.allocation != "owl":
        assert not needs_dense_moments(made)
    if made.sides and (made.propagation == "dense" or made.allocation == "owl"):
        assert needs_dense_moments(made)


def test_the_sides_of_a_contrast_are_kept_in_their_order() -> None:
    keep, against = variants_of(search(score=[CONTRAST]))[0].sides
    assert (str(keep), str(against)) == ("translation:en-fr", "code")
    turned = variants_of(search(score=["contrastive:code/translation:en-fr"]))[0]
    assert [str(side) for side in turned.sides] == ["code", "translation:en-fr"]
    assert turned.key != variants_of(search(score=[CONTRAST]))[0].key
    assert turned.demonstrations == (Demonstration("code", ()), Demonstration("translation", ("en", "fr")))


def test_a_side_may_be_a_mixture() -> None:
    (made,) = variants_of(search(score=["contrastive:mix:mono:fr=0.5,mono:de=0.5/mix:code=0.9,mono:en=0.1"]))
    assert [len(side.parts) for side in made.sides] == [2, 2]
    assert [str(part) for part in made.demonstrations] == ["mono:de", "mono:fr", "code", "mono:en"]


@pytest.mark.parametrize("value", [{"keep": "mono:fr"}, {"against": "code"}, {}, "code", None])
def test_a_contrast_with_one_side_missing_is_answered(value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        search(score=["wanda", {"contrastive": value}])
    assert str(caught.value) == (
        f"search.score[1]: {{'contrastive': {value!r}}}: contrastive needs both sides; write contrastive: "
        "{keep: translation:en-fr, against: code}, or contrastive:translation:en-fr/code"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("contrastive", "contrastive needs both sides; write contrastive: {keep"),
        ("contrastive:mono:fr", "contrastive needs both sides"),
        ("contrastive:mono:fr/", "contrastive needs both sides"),
        ("contrastive:mono:fr/code/mono:de", "contrastive needs both sides"),
        ("contrastive:mono:fr/cobol", "'cobol': write mono:fr"),
        ("wanda:mono:fr/code", "wanda reads one calibration at most; write wanda alone"),
        ("wander", "no such score"),
    ],
)
def test_a_score_that_cannot_be_is_answered(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        variants_of(search(score=["magnitude", text], calibration=["mono:en"]))
    assert str(caught.value).startswith("search.score[1]: ")
    assert words in str(caught.value)


def test_what_needs_calibration_says_so() -> None:
    for keys, words in (
        ({"score": ["sparsegpt"]}, "sparsegpt needs calibration; write [mono:en], say"),
        ({"score": ["random"], "allocation": ["owl"]}, "owl allocates by calibration; write [mono:en], say"),
    ):
        with pytest.raises(SpecError) as caught:
            variants_of(search(**keys))
        assert str(caught.value) == f"search.calibration: []: {words}"
    assert labels(score=[CONTRAST], allocation=["owl"]) == [
        "contrastive 0.5 translation:en-fr/code owl sequential"
    ]


def test_a_score_is_written_as_it_is_read() -> None:
    for text in ("wanda", "contrastive:translation:en-fr/mix:code=0.5,mono:en=0.5"):
        assert str(Scoring.parse(text)) == text
