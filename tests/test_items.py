"""Items: the metrics that follow from them, by hand or by sacrebleu itself, and the way through JSON."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from mlprune.evaluation.items import (
    Items,
    Kind,
    bleu_tokenizer,
    from_json,
    metrics_of,
    outcomes,
    signatures,
    to_json,
)

NAN, INF = math.nan, math.inf


def make(kind: Kind, language: str, task: str = "task", metric: str = "", **columns: list[Any]) -> Items:
    ids = tuple(str(number) for number in range(len(next(iter(columns.values())))))
    return Items(task, language, kind, ids, {name: tuple(column) for name, column in columns.items()}, metric)


def likelihood(language: str, nll: list[float], tokens: list[int], size: list[int]) -> Items:
    return make("likelihood", language, "perplexity", nll=nll, tokens=tokens, bytes=size)


def choice(language: str, scores: list[list[float]], answer: list[int], task: str = "xnli") -> Items:
    return make("choice", language, task, scores=scores, answer=answer)


def translation(pair: str, output: list[str], reference: list[str]) -> Items:
    return make("translation", pair, "translation", output=output, reference=reference)


def test_likelihoods() -> None:
    # en: 6 nats over 12 bytes and 4 tokens; fr: 10 nats over 10 bytes and 5 tokens
    items = [likelihood("en", [1.5, 4.5], [1, 3], [2, 10]), likelihood("fr", [10.0], [5], [10])]
    en, fr = 0.5 / math.log(2), 1 / math.log(2)
    assert metrics_of(items) == pytest.approx(
        {
            "bits_per_byte.en": en,
            "bits_per_byte.fr": fr,
            "perplexity.en": math.exp(1.5),
            "perplexity.fr": math.exp(2),
            "bits_per_byte.mean": (en + fr) / 2,
            "bits_per_byte.worst": fr,
        },
        rel=1e-15,
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_value_that_is_not_finite_is_reported_for_any_language(order: tuple[int, ...]) -> None:
    languages = [likelihood(code, [nll], [1], [1]) for code, nll in (("en", NAN), ("fr", 2.0), ("de", INF))]
    metrics = metrics_of([languages[place] for place in order])
    assert math.isnan(metrics["bits_per_byte.worst"])
    assert math.isnan(metrics["bits_per_byte.mean"])
    assert metrics["perplexity.de"] == math.exp(700), "the largest that a float is sure to hold"
    assert metrics["bits_per_byte.de"] == INF


def test_choices_take_the_first_of_the_highest_scores() -> None:
    scores = [[-3.0, -1.0, -2.0], [-1.0, -1.0, -2.0], [-2.0, -1.0, -1.0], [-INF, -INF, -INF]]
    assert outcomes(choice("en", scores, [1, 0, 2, 0])) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_choice_with_a_nan_is_wrong_whatever_the_answer(place: int) -> None:
    scores = [0.1, 0.2, 0.3]
    scores[place] = NAN
    assert outcomes(choice("en", [scores] * 3, [0, 1, 2])) == [0.0, 0.0, 0.0]


def test_accuracies_are_by_task_and_their_worst_is_the_lowest() -> None:
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    items = [
        choice("en", [right, right, right, wrong], [0, 0, 0, 0]),
        choice("sw", [right, wrong, wrong, wrong], [0, 0, 0, 0]),
        choice("en", [right, wrong], [0, 0], "reviews"),
    ]
    assert metrics_of(items) == {
        "xnli.en": 0.75,
        "xnli.sw": 0.25,
        "xnli.mean": 0.5,
        "xnli.worst": 0.25,
        "reviews.en": 0.5,
        "reviews.mean": 0.5,
        "reviews.worst": 0.5,
    }


def test_values_keep_the_name_of_their_metric() -> None:
    items = [
        make("value", "", "arc_easy", "acc", value=[1.0, 0.0, 1.0, 0.0]),
        make("value", "", "arc_easy", "acc_norm", value=[1.0, 0.0, 0.0, 0.0]),
    ]
    assert metrics_of(items) == {"arc_easy.acc": 0.5, "arc_easy.acc_norm": 0.25}


ENGLISH = ["The cat sat on the mat today.", 'He said, "no".', "It rains in the north of the country."]
GUESSES = ["The cat sat on a mat today.", "", "It rains in the south of the country."]
CHINESE = ["今天天气很好,我们去公园。", "他不在家。"]
GUESSED = ["今天天气好,我们去公园吧。", "她不在家。"]
JAPANESE = ["今日は天気がいいので公園へ行きます。"]
GUESSED_JAPANESE = ["今日は天気がよいので公園に行きます。"]


def test_translations_are_scored_as_sacrebleu_scores_a_corpus() -> None:
    items = [
        translation("fr-en", GUESSES, ENGLISH),
        translation("en-zh", GUESSED, CHINESE),
        translation("en-ja", GUESSED_JAPANESE, JAPANESE),
    ]
    expected = {
        "bleu.fr-en": sacrebleu.corpus_bleu(GUESSES, [ENGLISH]).score,
        "bleu.en-zh": sacrebleu.corpus_bleu(GUESSED, [CHINESE], tokenize="zh").score,
        "bleu.en-ja": sacrebleu.corpus_bleu(GUESSED_JAPANESE, [JAPANESE], tokenize="char").score,
        "chrf.fr-en": sacrebleu.corpus_chrf(GUESSES, [ENGLISH]).score,
        "chrf.en-zh": sacrebleu.corpus_chrf(GUESSED, [CHINESE]).score,
        "chrf.en-ja": sacrebleu.corpus_chrf(GUESSED_JAPANESE, [JAPANESE]).score,
    }
    for metric in ("bleu", "chrf"):
        expected[f"{metric}.mean"] = sum(expected[f"{metric}.{x}"] for x in ("fr-en", "en-zh", "en-ja")) / 3
    assert metrics_of(items) == expected
    assert 10 < min(expected.values()) <= max(expected.values()) < 90, "a score at an end would say little"


def test_an_empty_answer_scores_nothing() -> None:
    assert metrics_of([translation("fr-en", ["", ""], ENGLISH[:2])])["bleu.mean"] == 0.0


def test_signatures_name_the_tokenizer_of_the_target() -> None:
    assert bleu_tokenizer("fr") == "13a"
    assert {code: bleu_tokenizer(code) for code in ("zh", "ja", "ko", "th")} == {
        "zh": "zh",
        "ja": "char",
        "ko": "char",
        "th": "char",
    }
    told = signatures(["en-fr", "fr-zh", "en-th"])
    assert told.keys() == {f"{name}.{pair}" for name in ("bleu", "chrf") for pair in ("en-fr", "fr-zh", "en-th")}
    version = sacrebleu.__version__
    assert told["bleu.en-fr"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert told["chrf.fr-zh"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert "|tok:zh|" in told["bleu.fr-zh"]
    assert "|tok:char|" in told["bleu.en-th"]


FLOATS = st.lists(st.floats(), min_size=1, max_size=8)
TEXTS = st.lists(st.text(), min_size=1, max_size=8)


@settings(deadline=None)  # a loaded machine is no failure
@given(FLOATS, TEXTS)
def test_json_keeps_floats_exactly(numbers: list[float], texts: list[str]) -> None:
    items = [
        likelihood("fr", numbers, [1] * len(numbers), [2] * len(numbers)),
        choice("", [numbers, numbers[:1]], [0, 0]),
        make("value", "", "arc", "acc", value=numbers),
        translation("en-fr", texts, texts),
    ]
    again = from_json(to_json(items))
    # repr, because a NaN does not equal itself
    assert repr([(x, dict(x.columns)) for x in again]) == repr([(x, dict(x.columns)) for x in items])


def changed(**keys: object) -> str:
    """A file of one item, with some keys of it changed."""
    file = json.loads(to_json([likelihood("fr", [1.0, 2.0], [1, 2], [3, 4])]))
    file["items"][0] |= keys
    return json.dumps(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Invalid JSON"),
        ("[]", "object"),
        ('{"items": []}', "format"),
        ('{"format": "mlprune-items-0", "items": []}', "mlprune-items-1"),
        (changed(kind="guess"), "kind"),
        (changed(kind="value", metric="acc"), "columns"),
        (changed(metric="acc"), "metric"),
        (changed(ids=["1", "1"]), "repeated"),
        (changed(ids=[1, 2]), "ids.0"),
        (changed(ids=["1"]), "length"),
        (changed(documents=["a"]), "length"),
        (changed(documents=["a", 1]), "documents.1"),
        (changed(ids=[], columns={"nll": [], "tokens": [], "bytes": []}), "empty"),
        (changed(columns={"nll": [1.0, 2.0], "tokens": [1, 2]}), "columns"),
        (changed(columns={"nll": [1.0, "2.0"], "tokens": [1, 2], "bytes": [3, 4]}), "valid number"),
        (changed(columns={"nll": [1.0, None], "tokens": [1, 2], "bytes": [3, 4]}), "valid number"),
        (changed(columns={"nll": [1.0, 2.0], "tokens": [1.5, 2], "bytes": [3, 4]}), "valid integer"),
    ],
)
def test_another_file_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        from_json(text)
    assert "\n" not in str(refused.value)


def test_from_json_takes_what_a_change_leaves_whole() -> None:
    assert from_json(changed(language="de"))[0].language == "de"


def test_documents_survive_json_and_are_missing_in_old_files() -> None:
    items = replace(likelihood("fr", [1.0, 2.0, 3.0], [1, 2, 3], [4, 5, 6]), documents=("a", "a", "b"))
    assert items.units == ("a", "a", "b")
    assert from_json(to_json([items]))[0].documents == ("a", "a", "b")
    file = json.loads(to_json([items]))
    del file["items"][0]["documents"]
    old = from_json(json.dumps(file))[0]
    assert (old.documents, old.units) == ((), ("0", "1", "2"))


def test_items_are_picked_by_name() -> None:
    whole = replace(likelihood("fr", [1.0, 2.0, 3.0], [1, 2, 3], [4, 5, 6]), documents=("a", "a", "b"))
    items = whole.select(["2", "0"])
    assert items.documents == ("b", "a")
    assert items.ids == ("2", "0")
    assert items.columns == {"nll": (3.0, 1.0), "tokens": (3, 1), "bytes": (6, 4)}
