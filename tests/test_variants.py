"""How a trial is written: what is read, what is refused, and names and keys that stay the same."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlprune.errors import SpecError
from mlprune.spec.calibrations import Calibration, Demonstration
from mlprune.spec.languages import language_name
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Allocation, Pattern, Propagation, Scoring, Variant
from mlprune.sweep.grid import parse_variant, variants_of

HALF = Fraction(1, 2)
VARIANT = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")
FORMS = "write mono:fr, translation:en-fr, code, or several of them combined, "
NO_CODE = "not an ISO 639 code of a language"

# text as written -> text in canonical form
GOOD = {
    "mono:fr": "mono:fr",
    "mono:no": "mono:no",
    "mono:swh": "mono:swh",
    "translation:en-fr": "translation:en-fr",
    "translation:fr-en": "translation:fr-en",
    "mix:mono:en=0.5,mono:fr=0.5": "mix:mono:en=0.5,mono:fr=0.5",
    "mix:mono:en=.25,translation:en-hi=0.750": "mix:mono:en=0.25,translation:en-hi=0.75",
    "mix:mono:fr=0.333,mono:en=0.333,mono:de=0.333": "mix:mono:de=0.333,mono:en=0.333,mono:fr=0.333",
    "mix:mono:en=1": "mono:en",
    "mix:mono:fr,mono:en": "mix:mono:en=0.5,mono:fr=0.5",
    "mix:mono:fr,mono:en,mono:de": "mix:mono:de,mono:en,mono:fr",
    "mix:mono:en": "mono:en",
    "max:mono:fr,mono:en": "max:mono:en,mono:fr",
    "rank:mono:fr=0.5,mono:en=0.5": "rank:mono:en,mono:fr",
    "rank:mono:fr=0.75,code=0.25": "rank:code=0.25,mono:fr=0.75",
    "rank:mono:fr": "mono:fr",
    "power=8:mono:en,mono:fr": "power=8:mono:en,mono:fr",
    "power=8.50:mono:en,mono:fr": "power=8.5:mono:en,mono:fr",
    "power=10:mono:en,mono:fr": "power=10:mono:en,mono:fr",
    "variance=0:mono:en,translation:en-fr": "variance=0:mono:en,translation:en-fr",
    "variance=.5:mono:en,mono:fr": "variance=0.5:mono:en,mono:fr",
}
BAD = {
    "": FORMS,
    "mono": FORMS,
    "mono:": NO_CODE,
    "mono:en-fr": FORMS,
    "Mono:en": FORMS,
    " mono:en": FORMS,
    "code:en": FORMS,
    "translation:en": FORMS,
    "translation:en-fr-de": FORMS,
    "translation:en-": NO_CODE,
    "translation:en-en": "two different languages",
    "mono:EN": NO_CODE,
    "mono:xx": NO_CODE,
    "mono:french": NO_CODE,
    "mono:e1": NO_CODE,
    "mix:": FORMS,
    "rank:": FORMS,
    "mix": FORMS,
    "rank:mono:en=0.5,mono:fr": "write a weight for every part, or for none",
    "rank:mono:en,mono:en": "name each part once",
    "max:mono:en=0.5,mono:fr=0.4": "the weights sum to 0.9; they must sum to 1",
    "max=2:mono:en,mono:fr": "max has no parameter; write max:...",
    "power:mono:en,mono:fr": "power needs a number of at most 100",
    "power=:mono:en,mono:fr": "power needs a number of at most 100",
    "power=0:mono:en,mono:fr": "the exponent of power must be greater than 0",
    "power=-1:mono:en,mono:fr": "power needs a number of at most 100",
    "power=101:mono:en,mono:fr": "power needs a number of at most 100",
    "power=1e1:mono:en,mono:fr": "power needs a number of at most 100",
    "power=nan:mono:en,mono:fr": "power needs a number of at most 100",
    "variance=-0.5:mono:en,mono:fr": "variance needs a number of at most 100",
    "rank:rank:mono:en,mono:fr": FORMS,
    "mix:mono:en=": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=0,mono:fr=1": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=-1,mono:fr=2": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=1/2,mono:fr=1/2": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=1e-1,mono:fr=0.9": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=nan,mono:fr=1": "the weight of 'mono:en' must be a number in (0, 1]",
    "mix:mono:en=0.5,mono:fr=0.5,": "write a weight for every part, or for none",
    "mix:mono:en=0.5,mono:fr=0.4": "the weights sum to 0.9; they must sum to 1",
    "mix:mono:en=0.5,mono:fr=0.502": "the weights sum to 1.002; they must sum to 1",
    "mix:mono:en=0.5,mono:en=0.5": "name each part once",
    "mix:mono:en=0.5,mix:mono:fr=0.5": FORMS,
}


def line_of(error: pytest.ExceptionInfo[SpecError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    assert str(pickle.loads(pickle.dumps(error.value))) == line  # noqa: S301
    return line


@pytest.mark.parametrize(("text", "canonical"), GOOD.items())
def test_a_calibration_is_read_and_written(text: str, canonical: str) -> None:
    calibration = Calibration.parse(text)
    assert str(calibration) == canonical
    assert Calibration.parse(canonical) == calibration


@pytest.mark.parametrize(("text", "remedy"), BAD.items())
def test_a_calibration_that_cannot_be_is_answered(text: str, remedy: str) -> None:
    with pytest.raises(SpecError) as caught:
        Calibration.parse(text, "search.calibration[3]")
    assert line_of(caught).startswith("search.calibration[3]: ")
    assert remedy in line_of(caught)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("mono:fr", "mono:fr"),
        ("rank:mono:fr,mono:en", "rank:mono:en+fr"),
        ("mix:mono:fr=0.5,mono:en=0.5", "mix:mono:en+fr"),
        ("mix:mono:fr=0.7,mono:en=0.3", "mix:mono:en=0.3+fr=0.7"),
        ("max:translation:en-fr,translation:en-de", "max:translation:en-de+en-fr"),
        ("rank:mono:fr,translation:en-de", "rank:mono:fr,translation:en-de"),
        ("power=8:code,mono:fr", "power=8:code,mono:fr"),
    ],
)
def test_the_label_of_a_calibration(text: str, label: str) -> None:
    assert Calibration.parse(text).label == label


def test_the_parts_of_a_mixture_are_exact_and_in_one_order() -> None:
    calibration = Calibration.parse("mix:translation:en-fr=0.1,mono:fr=0.9")
    mono, translation = Demonstration("mono", ("fr",)), Demonstration("translation", ("en", "fr"))
    assert calibration.parts == ((mono, Fraction(9, 10)), (translation, Fraction(1, 10)))
    assert calibration == Calibration.parse("mix:mono:fr=0.9,translation:en-fr=0.1")
    assert calibration.languages == ("fr", "en")
    assert Calibration.parse("mono:hi").parts == ((Demonstration("mono", ("hi",)), Fraction(1)),)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=3))
def test_weights_of_three_digits_survive_writing(shares: list[int]) -> None:
    whole = 1000
    *most, _ = shares
    weights = [Fraction(share, whole) for share in (*most, whole - sum(most))]
    items = zip(("en", "fr", "de"), weights, strict=False)
    text = "mix:" + ",".join(f"mono:{code}={float(weight)}" for code, weight in items)
    calibration = Calibration.parse(text)
    assert {part.languages[0]: weight for part, weight in calibration.parts} == dict(
        zip(("en", "fr", "de"), weights, strict=False)
    )
    assert Calibration.parse(str(calibration)) == calibration


FINE = ["mix:mono:en=0.1234567,mono:fr=0.8765433", "mix:mono:en=0.99999,mono:fr=0.00001"]


@pytest.mark.parametrize("text", FINE)
def test_weights_of_many_digits_survive_writing(text: str) -> None:
    calibration = Calibration.parse(text)
    assert Calibration.parse(str(calibration)) == calibration


@pytest.mark.parametrize(
    ("text", "canonical", "sparsity"),
    [
        ("unstructured", "unstructured", None),
        ("2:4", "2:4", HALF),
        ("4:8", "4:8", HALF),
        ("1:4", "1:4", Fraction(3, 4)),
        ("3:5", "3:5", Fraction(2, 5)),
        ("02:4", "2:4", HALF),
        ("1:64", "1:64", Fraction(63, 64)),
    ],
)
def test_a_pattern_is_read_and_written(text: str, canonical: str, sparsity: Fraction | None) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == canonical
    assert Pattern.parse(canonical) == pattern
    assert pattern.sparsity == sparsity  # n of m are kept, not dropped


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "0:4",
        "4:4",
        "5:4",
        "1:65",
        "2:4:8",
        "-1:4",
        "2 : 4",
        "2:4\n",
        "Unstructured",
        "channels/0",
        "channels/",
    ],
)
def test_a_pattern_that_cannot_be_is_answered(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        Pattern.parse(text, "search.pattern[0]")
    remedy = "write unstructured, n:m (n weights kept of every m) such as 2:4, channels, or heads"
    assert line_of(caught) == f"search.pattern[0]: {text!r}: {remedy}"


@pytest.mark.parametrize(
    ("code", "name"),
    [("fr", "French"), ("no", "Norwegian"), ("hi", "Hindi"), ("sw", "Swahili"), ("zh", "Chinese")],
)
def test_languages_have_english_names(code: str, name: str) -> None:
    assert language_name(code) == name


@pytest.mark.parametrize("code", ["éé", "ａｂ"])
def test_letters_that_are_no_ascii_are_answered(code: str) -> None:
    with pytest.raises(SpecError, match="not an ISO 639 code"):
        language_name(code)


@pytest.mark.parametrize("code", ["und", "mul", "zxx", "qaa"])
def test_codes_of_no_language_are_refused(code: str) -> None:
    with pytest.raises(SpecError, match="not an ISO 639 code"):
        language_name(code)


def test_the_key_follows_every_field() -> None:
    others = [
        replace(VARIANT, calibration=Calibration.parse("mono:fr")),
        replace(VARIANT, calibration=None),
        replace(VARIANT, score=Scoring("magnitude")),
        replace(VARIANT, sparsity=0.5000001),
        replace(VARIANT, pattern=Pattern(2, 4)),
        replace(VARIANT, propagation="sequential"),
        replace(VARIANT, allocation="owl"),
        replace(VARIANT, seed=1),
        replace(VARIANT, seed=-1),
    ]
    assert VARIANT.key == replace(VARIANT).key
    assert len({VARIANT.key, *(other.key for other in others)}) == 1 + len(others)
    assert len(VARIANT.key) == 16
    assert int(VARIANT.key, 16)


def test_the_key_without_seed_and_repair_is_that_of_versions_without_them() -> None:
    """Literals from such a version: results that it stored are found by these keys."""
    assert VARIANT.key == "d5642cc03f31d653"
    assert parse_variant(None, "magnitude", 0.3, "2:4", "dense").key == "8118d5608d5cb0c3"
    without = {name: value for name, value in VARIANT.to_dict().items() if name not in ("seed", "repair")}
    assert Variant.from_dict(without) == VARIANT


def test_the_seed_is_kept_where_masks_depend_on_it() -> None:
    seeds = {
        parse_variant("mono:en", "magnitude", 0.5, "unstructured", "dense", seed=3).seed,
        parse_variant("mono:en", "inverse-magnitude", 0.5, "2:4", "dense", "owl", seed=3).seed,  # owl is ignored
    }
    assert seeds == {0}
    cases: list[tuple[str, Allocation]] = [("wanda", "uniform"), ("sparsegpt", "uniform"), ("random", "uniform")]
    for score, allocation in (*cases, ("magnitude", "owl")):
        variant = parse_variant("mono:en", score, 0.5, "unstructured", "dense", allocation, seed=3)
        assert variant.seed == 3
        assert variant.without_seed == parse_variant("mono:en", score, 0.5, "unstructured", "dense", allocation)
        assert variant.label == f"{variant.without_seed.label} seed 3"
        assert variant.short == f"{variant.without_seed.short} seed 3"
        assert Variant.from_dict(variant.to_dict()) == variant


def test_the_key_is_the_same_in_every_process() -> None:
    code = f"from mlprune.spec.variants import Variant; print(Variant.from_dict({VARIANT.to_dict()!r}).key)"
    for seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == VARIANT.key


def test_the_label_can_be_read() -> None:
    assert VARIANT.label == "wanda 0.5 translation:en-fr"
    assert replace(VARIANT, propagation="sequential").label == "wanda 0.5 translation:en-fr sequential"
    assert replace(VARIANT, calibration=None, score=Scoring("magnitude"), sparsity=0.3).label == "magnitude 0.3"
    assert replace(VARIANT, pattern=Pattern(2, 4)).label == "wanda 2:4 translation:en-fr"


@pytest.mark.parametrize(
    ("calibration", "score", "pattern", "propagation", "allocation", "short"),
    [
        ("translation:en-fr", "wanda", "unstructured", "dense", "uniform", "en-fr 0.5 wanda"),
        ("mono:fr", "wanda", "unstructured", "sequential", "owl", "fr 0.5 wanda owl seq"),
        ("mono:fr", "wanda", "2:4", "dense", "uniform", "fr 2:4 wanda"),
        ("code", "wanda", "unstructured", "dense", "uniform", "code 0.5 wanda"),
        ("mix:mono:hi=0.5,translation:en-fr=0.5", "ria", "unstructured", "dense", "uniform", "hi+en-fr 0.5 ria"),
        ("mix:mono:hi=0.25,translation:en-fr=0.75", "ria", "unstructured", "dense", "uniform", None),
        (None, "magnitude", "unstructured", "dense", "uniform", "0.5 magnitude"),
    ],
)
def test_short_names_begin_with_what_differs(
    calibration: str | None,
    score: str,
    pattern: str,
    propagation: Propagation,
    allocation: Allocation,
    short: str | None,
) -> None:
    variant = parse_variant(calibration, score, 0.5, pattern, propagation, allocation)
    assert variant.short == (short or "hi.25+en-fr.75 0.5 ria")


def test_short_names_tell_variants_apart() -> None:
    calibrations = ["mono:en", "mono:fr", "translation:en-fr", "translation:fr-en", "code"]
    calibrations += ["mix:mono:en=0.5,mono:fr=0.5", "mix:mono:en=0.4,mono:fr=0.6", "mix:mono:en=0.5,code=0.5"]
    search = {
        "calibration": calibrations,
        "score": ["wanda", "magnitude", "ria", "contrastive:mono:en/code", "contrastive:code/mono:en"],
        "sparsity": [0.3, 0.5],
        "pattern": ["unstructured", "2:4"],
        "propagation": ["dense", "sequential"],
        "allocation": ["uniform", "owl"],
        "seed": [0, 7],
    }
    variants = variants_of(parse_spec({"search": search}).search)
    assert len({variant.short for variant in variants}) == len(variants) > 100
