"""Questions answered by the likeliest of their filled templates, against the whole model and by hand."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlprune.errors import CorpusError, ModelError, SpecError, UserError
from mlprune.evaluation.choices import Choices, build_reviews, build_xnli
from mlprune.evaluation.items import chosen_labels
from mlprune.models.quiet import quiet_transformers
from mlprune.spec.evaluation import ReviewsSpec, XnliSpec
from mlprune.spec.templates import check_template
from tests.tiny import tokenizer
from tests.tiny_models import source
from tests.work import opened, ready

COLUMNS = ("premise", "hypothesis", "label")
ENGLISH = [("One {premise} of it", "Two", 0), ("Three, in other words", "Four", 2)]
FRENCH = [("Un {0} {", "Deux", 0), ("Trois, c'est-à-dire", "Quatre", 2), ("Cinq", "Six", 1)]
LABELS = ("negative", "positive")
REVIEWS = [("Très bon, rien à dire", 1), ("Bof", 0), ("Un mot, puis beaucoup d'autres mots : c'est nul", 0)]


def write(folder: Path, language: str, rows: Sequence[dict[str, Any]]) -> None:
    (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def inference(tmp_path: Path) -> XnliSpec:
    (folder := tmp_path / "xnli").mkdir()
    for language, rows in (("en", ENGLISH), ("fr", FRENCH)):
        write(folder, language, [dict(zip(COLUMNS, row, strict=True)) for row in rows])
    return XnliSpec(languages=("fr", "en"), data=str(folder))


@pytest.fixture
def sentiment(tmp_path: Path) -> ReviewsSpec:
    (folder := tmp_path / "reviews").mkdir()
    rows = [{"id": f"r{n}", "review": text, "label": label} for n, (text, label) in enumerate(REVIEWS)]
    write(folder, "fr", rows)
    return ReviewsSpec(languages=("fr",), data=str(folder))


def rows_of(choices: Choices) -> list[list[int]]:
    """Each row's tokens, as the batches have them; of every one the first alone is context."""
    found: dict[int, list[int]] = {}
    for batch in choices.rows.batches:
        assert batch.starts == (1,) * len(batch.rows)
        for row, ids, length in zip(batch.rows, batch.input_ids.tolist(), batch.lengths, strict=True):
            found[row] = ids[:length]
    assert sorted(found) == list(range(choices.rows.count))
    return [found[row] for row in range(choices.rows.count)]


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text, add_special_tokens=False).input_ids
    return ids


def test_a_row_is_one_token_of_context_and_a_filled_template(inference: XnliSpec) -> None:
    choices = build_xnli(inference, tokenizer(), None, False)
    texts = [
        *("Un {0} { , right? Yes , Deux", "Un {0} { , right? Also , Deux", "Un {0} { , right? No , Deux"),
        "Trois, c'est-à-dire , right? Yes , Quatre",
        "Trois, c'est-à-dire , right? Also , Quatre",
        "Trois, c'est-à-dire , right? No , Quatre",
        *("Cinq , right? Yes , Six", "Cinq , right? Also , Six", "Cinq , right? No , Six"),
        "One {premise} of it , right? Yes , Two",
        "One {premise} of it , right? Also , Two",
        "One {premise} of it , right? No , Two",
        "Three, in other words , right? Yes , Four",
        "Three, in other words , right? Also , Four",
        "Three, in other words , right? No , Four",
    ]
    assert rows_of(choices) == [[tokenizer().bos_token_id, *ids_of(text)] for text in texts]
    assert choices.tokens == tuple(len(ids_of(text)) for text in texts)
    doubled = inference.model_copy(update={"template": "{{{label}}} {hypothesis}<{premise}", "languages": ("en",)})
    first = rows_of(build_xnli(doubled, tokenizer(), None, False))[0]
    assert tokenizer().decode(first) == "<s>{Yes} Two<One {premise} of it"


def test_a_score_is_the_mean_log_probability_of_the_tokens_of_a_filled_template(inference: XnliSpec) -> None:
    choices = build_xnli(inference, tokenizer(), None, False)
    means = [[-1.0, -2.0, -3.0], [-2.5, -1.5, -2.0], [-4.0, -4.0, -3.5], [-7.0, -6.0, -5.0], [-0.5, -1.0, -0.75]]
    nll = [-mean * n for mean, n in zip((one for of in means for one in of), choices.tokens, strict=True)]
    french, english = choices.items(nll)
    assert (french.task, french.language, french.kind, french.ids) == ("xnli", "fr", "choice", ("1", "2", "3"))
    assert (english.task, english.language, english.kind, english.ids) == ("xnli", "en", "choice", ("1", "2"))
    assert list(french.columns["scores"]) == means[:3]
    assert list(english.columns["scores"]) == means[3:]
    assert (french.columns["answer"], english.columns["answer"]) == ((0, 2, 1), (0, 2))
    assert (chosen_labels(french), chosen_labels(english)) == ([0, 1, 2], [2, 0])


@torch.inference_mode()
def test_scores_are_the_whole_models_for_any_number_of_shards(
    inference: XnliSpec, sentiment: ReviewsSpec, tmp_path: Path
) -> None:
    with quiet_transformers():
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(source().folder).eval()

    def plain(text: str) -> float:
        ids = torch.tensor([[tokenizer().bos_token_id, *ids_of(text)]])
        log_probs_TV = model(ids).logits[0, :-1].log_softmax(-1)
        return float(log_probs_TV.gather(1, ids[0, 1:, None]).mean())

    def inferred(questions: Sequence[tuple[str, str, int]]) -> list[list[float]]:
        return [[plain(f"{a} , right? {label} , {b}") for label in ("Yes", "Also", "No")] for a, b, _ in questions]

    expected = {
        "xnli fr": inferred(FRENCH),
        "xnli en": inferred(ENGLISH),
        "reviews fr": [[plain(f"{text} It is {label}") for label in LABELS] for text, _ in REVIEWS],
    }
    tasks = (build_xnli(inference, tokenizer(), 512, False), build_reviews(sentiment, tokenizer(), 512, False))
    for shards in (1, 2):
        with opened(ready(tmp_path / str(shards), shards=shards)) as pipeline:
            answers = [items for task in tasks for items in task.items(pipeline.likelihood(task.rows))]
        assert [items.name for items in answers] == list(expected)
        for items in answers:
            scores = torch.tensor(items.columns["scores"])
            torch.testing.assert_close(scores, torch.tensor(expected[items.name]), atol=1e-5, rtol=0)
        assert answers[2].ids == ("r0", "r1", "r2")
        assert answers[2].columns["answer"] == (1, 0, 0)


# What is too long


@pytest.mark.parametrize(
    ("template", "head"), [("{review} It is {label}", ""), ("Review: {review}! {label}", "Review:")]
)
@pytest.mark.parametrize("labels", [("very negative", "positive"), ("negative", "very positive")])
def test_a_long_review_loses_its_beginning_and_keeps_its_label(
    template: str, head: str, labels: tuple[str, str], sentiment: ReviewsSpec
) -> None:
    asked = sentiment.model_copy(update={"template": template, "labels": labels})
    whole = rows_of(build_reviews(asked, tokenizer(), None, False))
    longest = max(map(len, whole))
    kept = longest - 9
    cut = build_reviews(asked, tokenizer(), kept, False)
    rows = rows_of(cut)
    assert rows[:4] == whole[:4], "two reviews fit"
    assert max(map(len, rows[4:])) == kept
    assert cut.tokens == tuple(len(row) - 1 for row in rows)
    start = 1 + len(ids_of(head))
    for before, after in zip(whole[4:], rows[4:], strict=True):
        assert after == before[:start] + before[start + 9 :], "of both labels the same tokens"
    assert rows_of(build_reviews(asked, tokenizer(), longest, False)) == whole


def test_a_review_is_cut_after_its_words(sentiment: ReviewsSpec, tmp_path: Path) -> None:
    texts = ["  one two\u3000three\n four five", "一つ、二つ、三つ、四つ", "one two"]
    write(Path(sentiment.data), "ja", [{"review": text, "label": n % 2} for n, text in enumerate(texts)])
    spec = sentiment.model_copy(update={"languages": ("ja",), "max_words": 3})
    rows = [tokenizer().decode(row[1:]) for row in rows_of(build_reviews(spec, tokenizer(), None, False))]
    assert rows[::2] == [f"{text} It is negative" for text in ("one two three", texts[1], "one two")]


def test_what_is_too_long_otherwise_is_answered(inference: XnliSpec, sentiment: ReviewsSpec) -> None:
    rows = rows_of(build_xnli(inference, tokenizer(), None, False))
    longest = max(map(len, rows))
    assert rows_of(build_xnli(inference, tokenizer(), longest, False)) == rows
    refused(
        lambda: build_xnli(inference, tokenizer(), longest - 1, False),
        CorpusError,
        f"evaluation.xnli.data: '{inference.data}': fr: question 2 is {longest} tokens with its context; ",
        f"the model takes {longest - 1}: shorten it",
    )
    bare = len(ids_of(" It is negative"))
    refused(
        lambda: build_reviews(sentiment, tokenizer(), bare + 1, False),
        SpecError,
        "evaluation.reviews.template: '{review} It is {label}': ",
        f"is {bare} tokens without a review; the model takes {bare + 1}: shorten it",
    )
    assert max(build_reviews(sentiment, tokenizer(), bare + 2, False).tokens) == bare + 1


def refused(call: Callable[[], object], kind: type[UserError], start: str, remedy: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(start)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


# Templates and the rest of the spec


TEMPLATES = {
    "{premise} {label}": "needs {hypothesis} once; its slots are {premise}, {hypothesis}, {label}",
    "{premise} {hypothesis}": "needs {label} once",
    "{premise} {premise} {label} {hypothesis}": "needs {premise} once",
    "{premise} {{label}} {hypothesis}": "needs {label} once",
    "{premise} {label} {hypothesis} {review}": "has a slot that is none of {premise}, {hypothesis}, {label};",
    "{premise} {label} {hypothesis} {}": "has a slot that is none of",
    "{premise} {label:>9} {hypothesis}": "has a slot that is none of",
    "{premise!r} {label} {hypothesis}": "has a slot that is none of",
    "{premise.x} {label} {hypothesis}": "has a slot that is none of",
    "{premise} {label} {hypothesis": "expected '}' before end of string; write a brace that is not a slot twice",
    "{premise} {label} } {hypothesis}": "write a brace that is not a slot twice",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_cannot_be_filled_is_one_line(template: str, inference: XnliSpec) -> None:
    asked = inference.model_copy(update={"template": template})
    start = f"evaluation.xnli.template: {template!r}: "
    refused(lambda: build_xnli(asked, tokenizer(), None, False), SpecError, start, TEMPLATES[template])


def test_each_kind_has_slots_of_its_own(sentiment: ReviewsSpec) -> None:
    asked = sentiment.model_copy(update={"template": "{premise} {label}"})
    start, remedy = "evaluation.reviews.template: ", "has a slot that is none of {review}, {label}"
    refused(lambda: build_reviews(asked, tokenizer(), None, False), SpecError, start, remedy)
    check_template("{label}{{}}{review}", "any", ("review", "label"))


@pytest.mark.parametrize(("task", "make"), [("xnli", build_xnli), ("reviews", build_reviews)])
def test_keys_of_data_name_the_task(task: str, make: Any, request: pytest.FixtureRequest) -> None:
    asked = request.getfixturevalue({"xnli": "inference", "reviews": "sentiment"}[task])
    missing = asked.model_copy(update={"languages": ("fr", "sw")})
    many = asked.model_copy(update={"items": 4})
    start = f"evaluation.{task}."
    refused(lambda: make(missing, tokenizer(), None, False), CorpusError, f"{start}data: ", "sw: has no sw.jsonl")
    refused(lambda: make(many, tokenizer(), None, False), CorpusError, f"{start}items: 4: ", "has 3 in fr")


def test_the_key_is_of_all_that_the_answers_depend_on(inference: XnliSpec) -> None:
    def key(**changes: Any) -> str:
        return build_xnli(inference.model_copy(update=changes), tokenizer(), None, False).rows.key

    keys = [key(), key(languages=("en", "fr")), key(items=2), key(labels=("Yes", "No", "Also"))]
    for change in ({}, {"label": 1}, {"id": "9"}):
        rows = [{"id": f"r{n}", **dict(zip(COLUMNS, row, strict=True))} for n, row in enumerate(FRENCH)]
        write(Path(inference.data), "fr", [rows[0] | change, *rows[1:]])
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_no_pads_for_models_that_would_route_them(inference: XnliSpec) -> None:
    padded, free = (build_xnli(inference, tokenizer(), None, pad_free) for pad_free in (False, True))
    assert rows_of(padded) == rows_of(free)
    assert any(len(set(batch.lengths)) > 1 for batch in padded.rows.batches)
    assert all(len(set(batch.lengths)) == 1 for batch in free.rows.batches)


def test_the_context_is_the_end_of_sequence_where_there_is_no_beginning(inference: XnliSpec) -> None:
    other = deepcopy(tokenizer())
    other.bos_token = None
    assert {row[0] for row in rows_of(build_xnli(inference, other, None, False))} == {other.eos_token_id}
    other.eos_token = None
    remedy = "has no begin- or end-of-sequence token"
    refused(lambda: build_xnli(inference, other, None, False), ModelError, "tokenizer: ", remedy)
