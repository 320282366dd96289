"""Questions: the same from every form, and one-line errors for malformed data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlprune.data.questions import INFERENCE, SENTIMENT, Form, Question, open_questions
from mlprune.errors import CorpusError

KEY = "evaluation.xnli"
QUOTED = 'Il a dit "non"\u2028et {rien} de plus. '  # a separator that str.splitlines would cut at; braces; a space
ROWS: list[dict[str, Any]] = [
    {"premise": QUOTED, "hypothesis": "Il a refusé.", "label": 0},
    {"premise": "Deux", "hypothesis": "Trois", "label": 2},
    {"premise": "Quatre", "hypothesis": "Cinq", "label": 1},
]
EXPECTED = [
    Question(str(n), {"premise": row["premise"], "hypothesis": row["hypothesis"]}, row["label"])
    for n, row in enumerate(ROWS, 1)
]
NAMES = ("entailment", "neutral", "contradiction")


def as_jsonl(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def as_tsv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join("\t".join(line) for line in lines).encode())


WRITERS = {"jsonl": as_jsonl, "tsv": as_tsv}


def opened(where: Path | str, items: int | None = None, form: Form = INFERENCE) -> list[Question]:
    return open_questions(str(where), "fr", form, items, KEY)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("named", [False, True])
def test_every_form_gives_the_same_questions_verbatim(suffix: str, named: bool, tmp_path: Path) -> None:
    rows = [{**row, "label": NAMES[row["label"]] if named else row["label"]} for row in ROWS]
    WRITERS[suffix](rows, tmp_path / f"fr.{suffix}")
    assert opened(tmp_path) == EXPECTED


@pytest.mark.parametrize("suffix", WRITERS)
def test_ids_are_the_rows_own_where_it_has_some(suffix: str, tmp_path: Path) -> None:
    WRITERS[suffix](
        [{**row, "id": n} for n, row in zip((0, "b 7", 5), ROWS, strict=True)], tmp_path / f"fr.{suffix}"
    )
    assert [one.id for one in opened(tmp_path)] == ["0", "b 7", "5"]


def test_items_are_the_first_ones(tmp_path: Path) -> None:
    as_jsonl(ROWS, tmp_path / "fr.jsonl")
    assert opened(tmp_path, 2) == EXPECTED[:2]
    assert opened(tmp_path, 1) == EXPECTED[:1]
    assert opened(tmp_path, 3) == EXPECTED


@pytest.mark.parametrize("seed", [0, 7])
def test_shuffled_items_are_those_of_datasets(seed: int, tmp_path: Path) -> None:
    import datasets

    rows = [{**ROWS[n % 3], "premise": f"Phrase {n}"} for n in range(50)]
    as_jsonl(rows, tmp_path / "fr.jsonl")
    expected = datasets.Dataset.from_list(rows).shuffle(seed=seed).select(range(20))
    chosen = open_questions(str(tmp_path), "fr", INFERENCE, 20, KEY, seed)
    assert [question.texts["premise"] for question in chosen] == expected["premise"][:]
    assert [question.answer for question in chosen] == expected["label"][:]
    assert [question.id for question in chosen] == [str(int(text[7:]) + 1) for text in expected["premise"]]
    stars = [{"text": f"Avis {n}", "stars": n % 5 + 1} for n in range(50)]
    as_jsonl(stars, tmp_path / "fr.jsonl")
    without = datasets.Dataset.from_list([row for row in stars if row["stars"] != 3]).shuffle(seed=seed)
    chosen = open_questions(str(tmp_path), "fr", SENTIMENT, 20, "evaluation.reviews", seed)
    assert [question.texts["review"] for question in chosen] == without["text"][:20], "3 stars are left out before"


def test_a_hub_dataset_is_loaded_by_language_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split))
        names = datasets.Features(
            premise=datasets.Value("string"),
            hypothesis=datasets.Value("string"),
            label=datasets.ClassLabel(names=list(NAMES)),
        )
        return datasets.Dataset.from_list(ROWS, features=names)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert opened("facebook/xnli") == opened("facebook/xnli@validation") == EXPECTED
    assert opened("org/xnli_{language}") == EXPECTED, "one dataset per language"
    assert asked == [
        ("facebook/xnli", "fr", "test"),
        ("facebook/xnli", "fr", "validation"),
        ("org/xnli_fr", None, "test"),
    ]


def test_a_dataset_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ValueError("BuilderConfig 'fr' not found.\nAvailable: ['de', 'en']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CorpusError) as caught:
        opened("org/name")
    assert str(caught.value).startswith("evaluation.xnli.data: 'org/name': fr: cannot be loaded")
    assert "Available: ['de', 'en']" in str(caught.value)
    assert "or give a folder that has fr.jsonl or fr.tsv" in str(caught.value)
    assert "\n" not in str(caught.value)


def reviews(name: str, column: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    return [{name: f"Avis {n}", column: value} for n, value in enumerate(values, 1)]


@pytest.mark.parametrize("name", ["review", "text", "review_body"])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("stars", (1, 5, 3, 2, 4)),
        ("label", (0, 4, 2, 1, 3)),  # stars less one
        ("label", (0, 1, 0, 0, 1)),
        ("label", ("negative", "positive", 0, 0, 1)),
    ],
)
@pytest.mark.parametrize("suffix", WRITERS)
def test_reviews_have_labels_or_stars_of_which_three_are_left_out(
    name: str, column: str, values: Sequence[Any], suffix: str, tmp_path: Path
) -> None:
    WRITERS[suffix](reviews(name, column, values), tmp_path / f"fr.{suffix}")
    found = opened(tmp_path, form=SENTIMENT)
    answers = [("1", 0), ("2", 1), ("3", 0), ("4", 0), ("5", 1)]
    assert [(one.id, one.answer) for one in found] == [
        one for one in answers if len(set(values)) < 5 or one[0] != "3"
    ]
    assert [dict(one.texts) for one in found] == [{"review": f"Avis {one.id}"} for one in found]


def test_a_review_column_goes_before_others_and_a_label_before_stars(tmp_path: Path) -> None:
    rows = [{"text": "no", "review": f"yes {n}", "stars": 5, "label": n} for n in (0, 1)]
    as_jsonl(rows, tmp_path / "fr.jsonl")
    assert [(one.texts["review"], one.answer) for one in opened(tmp_path, form=SENTIMENT)] == [
        ("yes 0", 0),
        ("yes 1", 1),
    ]


def changed(row: int = 1, **changes: Any) -> list[dict[str, Any]]:
    return [{**one, **(changes if n == row else {})} for n, one in enumerate(ROWS)]


def with_ids(*ids: Any) -> list[dict[str, Any]]:
    return [{**row, "id": one} for one, row in zip(ids, ROWS, strict=False)]


STARS = reviews("review", "stars", (1, 2, 1, 5))
ONLY_THREE = reviews("review", "stars", (3, 3))
NO_HYPOTHESIS = [{"premise": "a", "label": 0}]
# rows, the key and what the answer says; the number of items asked for stands with the key
MISTAKES: dict[str, tuple[Sequence[Mapping[str, Any]], Form, str, str]] = {
    "column": (NO_HYPOTHESIS, INFERENCE, "data", "has no column hypothesis; it has premise, label: rename"),
    "grade": (
        reviews("text", "grade", (1,)),
        SENTIMENT,
        "data",
        "has no column label or stars; it has text,",
    ),
    "label": (changed(label="maybe"), INFERENCE, "data", "line 2 has the label 'maybe'; known: 0, 1, 2, entail"),
    "number": (changed(label=3), INFERENCE, "data", "line 2 has the label 3; known: 0, 1, 2, entailment"),
    "another's label": (changed(label="positive"), INFERENCE, "data", "line 2 has the label 'positive'"),
    "no label": (changed(label=None), INFERENCE, "data", "line 2 has the label None"),
    "truth": (changed(label=True), INFERENCE, "data", "line 2 has the label True"),
    "stars": (reviews("text", "stars", (1, 6)), SENTIMENT, "data", "line 2 has the stars 6; known: 1, 2, 3, 4, 5"),
    "late": (
        reviews("text", "label", (0, 1, 1, 4)),
        SENTIMENT,
        "data 2",
        "line 4 has the label 4; known: 0, 1",
    ),
    "blank": (changed(premise=" \u3000"), INFERENCE, "data", "line 2 of premise is empty"),
    "null": (changed(hypothesis=None), INFERENCE, "data", "line 2 of hypothesis is empty"),
    "no text": (changed(premise=7), INFERENCE, "data", "line 2 of premise is int, not text"),
    "half": (changed(premise="\ud83d"), INFERENCE, "data", "line 2 of premise has half a character"),
    "no id": (with_ids("a", ""), INFERENCE, "data", "line 2 has no id"),
    "id lost": ([*with_ids("a"), ROWS[1]], INFERENCE, "data", "line 2 has no id"),
    "id twice": (with_ids("a", "b", "a"), INFERENCE, "data", "line 3 repeats the id a"),
    "three stars": (ONLY_THREE, SENTIMENT, "data", "has only reviews of 3 stars"),
    "few": (ROWS, INFERENCE, "items 4", "has 3 in fr; use a smaller number"),
    "few stars": ([*ONLY_THREE, *STARS], SENTIMENT, "items 5", "has 4 in fr; use a smaller number"),
    "one class": (STARS, SENTIMENT, "items 3", "the first 3 questions in fr are all negative; use more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_row_is_one_line(mistake: str, tmp_path: Path) -> None:
    rows, form, where, remedy = MISTAKES[mistake]
    (tmp_path / "fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    key, _, items = where.partition(" ")
    check(tmp_path, form, int(items) if items else None, key, remedy)


def check(where: Path | str, form: Form, items: int | None, key: str, remedy: str) -> None:
    with pytest.raises(CorpusError) as caught:
        opened(where, items, form)
    line = str(caught.value)
    value = repr(str(where)) if key == "data" else str(items)
    assert line.startswith(f"{KEY}.{key}: {value}: ")
    assert remedy in line
    assert "\n" not in line


FILES = {
    "no rows": ("fr.tsv", "premise\thypothesis\tlabel\n", "fr: has no rows"),
    "empty": ("fr.jsonl", "", "fr.jsonl is empty"),
    "not json": ("fr.jsonl", "premise", "line 1 is not JSON"),
    "no object": (
        "fr.jsonl",
        "[1]",
        'write {"premise": "...", "hypothesis": "...", "label": 0}',
    ),
    "a cell too few": ("fr.tsv", "premise\thypothesis\tlabel\na\tb\n", "row 1 below the header has 2 columns"),
    "a column twice": ("fr.tsv", "premise\tpremise\n", "the header of fr.tsv names a column twice"),
    "not utf-8": ("fr.jsonl", "\udcff", "fr.jsonl is not UTF-8 at byte 0"),
    "another language": ("de.tsv", "premise\n", "has no fr.jsonl or fr.tsv; its languages: de, en"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_wrong_file_is_one_line(file: str, tmp_path: Path) -> None:
    name, text, remedy = FILES[file]
    (tmp_path / "en.jsonl").write_text("{}")
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    check(tmp_path, INFERENCE, None, "data", remedy)


@pytest.mark.parametrize(
    ("where", "remedy"),
    [
        ("/nowhere/xnli", "no such folder; give one that has fr.jsonl or fr.tsv"),
        ("./xnli", "no such folder"),
        ("xnli.jsonl", "no such folder"),
        ("facebook/xnli:fr@test", "the configuration is the language; write ID or ID@SPLIT"),
    ],
)
def test_what_is_no_folder_and_no_id_is_one_line(where: str, remedy: str) -> None:
    check(where, INFERENCE, None, "data", remedy)


def test_an_empty_folder_and_a_file_are_no_data(tmp_path: Path) -> None:
    check(tmp_path, INFERENCE, None, "data", "its languages: none")
    as_jsonl(ROWS, tmp_path / "all.json")
    check(tmp_path / "all.json", INFERENCE, None, "data", "no such folder")
