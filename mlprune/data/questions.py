"""Questions with a right answer among a few labels, in several languages, opened from either of two forms.

    FOLDER          fr.jsonl or fr.tsv (with a header), ...: a file a language
    ID[@SPLIT]      a Hugging Face dataset with a configuration a language, as facebook/xnli; the split is test

A row has the columns of the task's `Form`, and `label`: a number, or the label's name. Reviews may have `stars`
instead: 1 and 2 are negative, 4 and 5 positive, and those of 3 are left out, as in the two-class reading of the
Multilingual Amazon Reviews Corpus (MARC, Keung et al. 2020, arXiv 2010.02573). A label of reviews that goes up
to 4 is their stars less one.

`id` names a row if it is there, else its number from 1. Where languages are parallel, as in XNLI, the same id must
be the same question in each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlprune.data.corpora import PATH_STARTS, Fault, checked_text, jsonl_rows, read_dataset, tsv_columns
from mlprune.errors import CorpusError

SPLIT = "test"
SUFFIXES = (".jsonl", ".tsv")
STARS = {"1": 0, "2": 0, "3": None, "4": 1, "5": 1}

_Row = Mapping[str, object]


@dataclass(frozen=True)
class Form:
    """What the questions of a task consist of."""

    columns: Mapping[str, tuple[str, ...]]  # each text, and the names that its column may have
    labels: tuple[str, ...]  # their names, in the order of their numbers
    starred: bool = False  # whether `stars` may stand for the label


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


def open_questions(where: str, language: str, form: Form, items: int | None, key: str) -> list[Question]:
    """The first `items` questions of `where` (see the top of the file) in `language`; None is all of them.

    Raises CorpusError, naming `key`.data or `key`.items, when the language, a column, a text or enough questions
    are wanting, or a row is malformed. All rows are read, so that a wrong label is seen wherever it stands.
    """

    def fault(remedy: str) -> CorpusError:
        return CorpusError(f"{key}.data", repr(where), f"{language}: {remedy}")

    found = _questions(_rows(where, language, form, fault), form, fault)
    if not found:
        raise fault("has only reviews of 3 stars, which are left out; add others")
    if items is None:
        return found
    if items > len(found):
        raise CorpusError(f"{key}.items", items, f"{where!r} has {len(found)} in {language}; ask for no more")
    taken = found[:items]
    if items > 1 and len({one.answer for one in taken}) == 1 < len({one.answer for one in found}):
        # sets of reviews are often sorted by stars; such an accuracy would say nothing
        remedy = f"the first {items} questions in {language} are all {form.labels[taken[0].answer]}"
        raise CorpusError(f"{key}.items", items, f"{remedy}; ask for more, or shuffle the rows of {where!r}")
    return taken


def _rows(where: str, language: str, form: Form, fault: Fault) -> Sequence[_Row]:
    """What is on the disk goes before what may be on the hub."""
    folder = Path(where)
    if folder.is_dir():
        return _file_rows(_file(folder, language, fault), form, fault)
    if folder.exists() or folder.suffix in SUFFIXES or where.startswith(PATH_STARTS):
        raise fault(f"no such folder; give one that has {language}.jsonl or {language}.tsv")
    name, _, split = where.partition("@")
    if ":" in name:
        raise fault("the configuration is the language; write ID or ID@SPLIT")
    instead = f"a folder that has {language}.jsonl or {language}.tsv"
    return read_dataset(f"{name}:{language}@{split or SPLIT}", list, fault, instead)


def _file(folder: Path, language: str, fault: Fault) -> Path:
    for suffix in SUFFIXES:
        if (file := folder / f"{language}{suffix}").is_file():
            return file
    there = sorted({file.stem for file in folder.iterdir() if file.suffix in SUFFIXES})
    raise fault(f"has no {language}.jsonl or {language}.tsv; languages there: {', '.join(there) or 'none'}")


def _file_rows(file: Path, form: Form, fault: Fault) -> Sequence[_Row]:
    if file.suffix == ".jsonl":
        example = ", ".join(f'"{name}": "..."' for name in form.columns)
        return jsonl_rows(file, fault, f'{{{example}, "label": 0}}')
    columns = {name: read() for name, read in tsv_columns(file, fault).items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _questions(rows: Sequence[_Row], form: Form, fault: Fault) -> list[Question]:
    """Every row that has an answer."""
    if not rows:
        raise fault("has no rows; add some")
    there = list(rows[0])
    sources = {name: _column(names, there, fault) for name, names in form.columns.items()}
    label = _column(("label", "stars") if form.starred else ("label",), there, fault)
    known = _known([str(row.get(label)) for row in rows], label, form)
    found: dict[str, Question] = {}
    for number, row in enumerate(rows, 1):
        texts = {name: _text(row.get(source), number, source, fault) for name, source in sources.items()}
        answer = _answer(row.get(label), number, label, known, fault)
        name = row.get("id") if "id" in there else number
        if name in (None, ""):
            raise fault(f"line {number} has no id; give it one")
        if str(name) in found:
            raise fault(f"line {number} has the id {name} of a line before; an id names one question")
        if answer is not None:
            found[str(name)] = Question(str(name), texts, answer)
    return list(found.values())


def _column(names: Sequence[str], there: Sequence[str], fault: Fault) -> str:
    """Which of `names` the rows have; the first goes before the others."""
    for name in names:
        if name in there:
            return name
    raise fault(f"has no column {' or '.join(names)}; it has {', '.join(there)}: rename the one that is meant")


def _text(value: object, number: int, name: str, fault: Fault) -> str:
    text = checked_text(value, number, name, fault)
    if not text.strip():
        raise fault(f"line {number} of {name} is empty; fill it, or remove the line from every language")
    return text


def _known(values: Sequence[str], label: str, form: Form) -> Mapping[str, int | None]:
    """What each value says: an answer, or None for a review that is neither negative nor positive."""
    if label == "stars":
        return STARS
    if form.starred and {"3", "4"} <= set(values):
        return {str(int(star) - 1): answer for star, answer in STARS.items()}
    return {**{str(n): n for n in range(len(form.labels))}, **{name: n for n, name in enumerate(form.labels)}}


def _answer(value: object, number: int, label: str, known: Mapping[str, int | None], fault: Fault) -> int | None:
    if str(value) not in known:
        raise fault(f"line {number} has the {label} {value!r}; known: {', '.join(known)}")
    return known[str(value)]
