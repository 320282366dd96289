"""Questions with one right answer among a few labels, in several languages, opened from either of two forms.

    FOLDER          fr.jsonl or fr.tsv (with a header), ...: one file per language
    ID[@SPLIT]      a Hugging Face dataset with one configuration per language, e.g. facebook/xnli, or one dataset
                    per language, with {language} in its name: org/reviews_{language}; default split: test

How a model answers them is not decided here: see `evaluation.choices`.

A row has the columns of the task's `Form`, and `label`: a number, or the label's name. Reviews may have `stars`
instead: 1 and 2 are negative, 4 and 5 positive, and reviews of 3 stars are left out, as in the two-class reading
of the Multilingual Amazon Reviews Corpus (MARC, Keung et al. 2020, arXiv 2010.02573). Labels of reviews that go up
to 4 are read as their stars minus one.

`id` names a row if the column exists, otherwise its number from 1 does. Where languages are parallel, as in XNLI,
the same id must be the same question in each language.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlprune.data.readers import PATH_STARTS, Fault, checked_text, jsonl_rows, read_dataset, tsv_columns
from mlprune.errors import CorpusError

SPLIT = "test"
SUFFIXES = (".jsonl", ".tsv")
STARS = {"1": 0, "2": 0, "3": None, "4": 1, "5": 1}

_LANGUAGE = "{language}"  # in a name, stands for the language's code
_Row = Mapping[str, object]


@dataclass(frozen=True)
class Form:
    """The columns and labels of a task's questions."""

    columns: Mapping[str, tuple[str, ...]]  # text of a question -> the names that its column may have
    labels: tuple[str, ...]  # names of the labels, in the order of their numbers
    starred: bool = False  # whether a column `stars` may replace the label


INFERENCE = Form(
    columns={"premise": ("premise",), "hypothesis": ("hypothesis",)},
    labels=("entailment", "neutral", "contradiction"),
)
SENTIMENT = Form(
    columns={"review": ("review", "text", "review_body")}, labels=("negative", "positive"), starred=True
)


@dataclass(frozen=True)
class Question:
    """One row. No text is blank."""

    id: str
    texts: Mapping[str, str]
    answer: int  # the index of the right label


def open_questions(
    where: str, language: str, form: Form, items: int | None, key: str, shuffle_seed: int | None = None
) -> list[Question]:
    """Return the first `items` questions of `where` (see the top of the file) in `language`; None means all.

    With `shuffle_seed`, the first ones of the order of `Dataset.shuffle(seed)` of the library datasets, in which
    the paper's code (see `evaluation.choices`) takes its 1,000: equal for languages with equally many questions.
    Raises CorpusError, naming `key`.data or `key`.items, when the language, a column or a text is missing, there
    are too few questions, or a row is malformed. All rows are read, so that a wrong label is found in any of them.
    """

    def fault(remedy: str) -> CorpusError:
        return CorpusError(f"{key}.data", repr(where), f"{language}: {remedy}")

    questions = _questions(_rows(where, language, form, fault), form, fault)
    if not questions:
        raise fault("has only reviews of 3 stars, which are left out; add others")
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(len(questions))
        questions = [questions[number] for number in order]
    if items is None:
        return questions
    if items > len(questions):
        remedy = f"{where!r} has {len(questions)} in {language}; use a smaller number"
        raise CorpusError(f"{key}.items", items, remedy)
    first = questions[:items]
    if items > 1 and len(_answers(first)) == 1 < len(_answers(questions)):
        # datasets of reviews are often sorted by stars; an accuracy on one label would be meaningless
        remedy = f"the first {items} questions in {language} are all {form.labels[first[0].answer]}"
        raise CorpusError(f"{key}.items", items, f"{remedy}; use more, or set {key}.shuffle_seed")
    return first


def _answers(questions: Sequence[Question]) -> set[int]:
    return {question.answer for question in questions}


def _rows(where: str, language: str, form: Form, fault: Fault) -> Sequence[_Row]:
    """Read the rows of one language. Local files take precedence over the hub."""
    folder = Path(where)
    if folder.is_dir():
        return _file_rows(_file(folder, language, fault), form, fault)
    if folder.exists() or folder.suffix in SUFFIXES or where.startswith(PATH_STARTS):
        raise fault(f"no such folder; give one that has {language}.jsonl or {language}.tsv")
    name, _, split = where.partition("@")
    if ":" in name:
        raise fault("the configuration is the language; write ID or ID@SPLIT")
    instead = f"a folder that has {language}.jsonl or {language}.tsv"
    dataset = name.replace(_LANGUAGE, language) if _LANGUAGE in name else f"{name}:{language}"
    return read_dataset(f"{dataset}@{split or SPLIT}", list, fault, instead)


def _file(folder: Path, language: str, fault: Fault) -> Path:
    for suffix in SUFFIXES:
        if (file := folder / f"{language}{suffix}").is_file():
            return file
    languages = sorted({file.stem for file in folder.iterdir() if file.suffix in SUFFIXES})
    raise fault(f"has no {language}.jsonl or {language}.tsv; its languages: {', '.join(languages) or 'none'}")


def _file_rows(file: Path, form: Form, fault: Fault) -> Sequence[_Row]:
    if file.suffix == ".jsonl":
        example = ", ".join(f'"{name}": "..."' for name in form.columns)
        return jsonl_rows(file, fault, f'{{{example}, "label": 0}}')
    columns = {name: read() for name, read in tsv_columns(file, fault).items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _questions(rows: Sequence[_Row], form: Form, fault: Fault) -> list[Question]:
    """Parse the rows, and return those that have an answer."""
    if not rows:
        raise fault("has no rows; add some")
    columns = list(rows[0])
    sources = {name: _column(names, columns, fault) for name, names in form.columns.items()}
    label = _column(("label", "stars") if form.starred else ("label",), columns, fault)
    answers = _answer_of_label([str(row.get(label)) for row in rows], label, form)
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows, 1):
        texts = {name: _text(row.get(source), number, source, fault) for name, source in sources.items()}
        answer = _answer(row.get(label), number, label, answers, fault)
        name = row.get("id") if "id" in columns else number
        if name in (None, ""):
            raise fault(f"line {number} has no id; give it one")
        if str(name) in questions:
            raise fault(f"line {number} repeats the id {name}; give every question its own id")
        if answer is not None:
            questions[str(name)] = Question(str(name), texts, answer)
    return list(questions.values())


def _column(names: Sequence[str], columns: Sequence[str], fault: Fault) -> str:
    """Return the first of `names` that is a column."""
    for name in names:
        if name in columns:
            return name
    has = ", ".join(columns)
    raise fault(f"has no column {' or '.join(names)}; it has {has}: rename the column that holds it")


def _text(value: object, number: int, name: str, fault: Fault) -> str:
    text = checked_text(value, number, name, fault)
    if not text.strip():
        raise fault(f"line {number} of {name} is empty; fill it, or remove the line from every language")
    return text


def _answer_of_label(values: Sequence[str], label: str, form: Form) -> Mapping[str, int | None]:
    """Map each valid value of the label column to its answer: None for a review neither negative nor positive."""
    if label == "stars":
        return STARS
    if form.starred and {"3", "4"} <= set(values):
        return {str(int(star) - 1): answer for star, answer in STARS.items()}
    return {**{str(n): n for n in range(len(form.labels))}, **{name: n for n, name in enumerate(form.labels)}}


def _answer(value: object, number: int, label: str, answers: Mapping[str, int | None], fault: Fault) -> int | None:
    if str(value) not in answers:
        raise fault(f"line {number} has the {label} {value!r}; known: {', '.join(answers)}")
    return answers[str(value)]
