r"""Parallel corpora: the same lines in several languages, and which of them are held out for evaluation.

A corpus is opened from any of five forms; the readers of single files and datasets are in `readers`.

    sample                      the corpus that ships with mlprune (NTREX-128, 14 languages, 1,200 lines)
    FOLDER                      fr.txt, hi.txt, ... aligned by line number; DOCUMENT_IDS.tsv if it exists
    FOLDER                      one split of a dataset, written by `datasets.save_to_disk`
    FILE.tsv, FILE.jsonl        a column (a key) per language; optionally `document`
    ID[:CONFIG][@SPLIT]         a Hugging Face dataset: a column per language, or one `translation` column

Lines end at "\n" and nowhere else (see `readers.read_lines`).

Calibration and evaluation never share a document: neighbouring sentences give each other away, so a split by
line would leak what calibration saw into the evaluation.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from mlprune.data.readers import (
    PATH_STARTS,
    Columns,
    Fault,
    checked_text,
    is_saved,
    jsonl_columns,
    members,
    read_dataset,
    read_lines,
    tsv_columns,
)
from mlprune.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = Path(__file__).parent / "sample"
KEY = "calibration.corpus"
DOCUMENT = "document"
TRANSLATION = "translation"  # a column of dicts, language -> text
# Without document ids this many neighbouring lines count as one document, since neighbours share their context.
BLOCK_LINES = 10

_FILE_READERS: Mapping[str, Callable[[Path, Fault], Columns]] = {".tsv": tsv_columns, ".jsonl": jsonl_columns}


@dataclass(frozen=True)
class Corpus:
    """Parallel text. All columns, and `documents`, have one length; no line is empty."""

    name: str  # as the user wrote it
    lines: Mapping[str, Sequence[str]]  # language code -> its lines
    documents: tuple[str, ...]  # the document id of each line
    documents_named: bool = True  # False: the corpus names no documents, so they are blocks of BLOCK_LINES lines

    def __len__(self) -> int:
        return len(self.documents)

    def column(self, language: str, key: str) -> Sequence[str]:
        """Return the lines in one language. Raises CorpusError, naming `key`, when it was not opened."""
        if language not in self.lines:
            raise CorpusError(
                key, repr(language), f"not in the corpus {self.name!r}; it has {_listed(self.lines)}"
            )
        return self.lines[language]

    def named_documents(self, lines: Iterable[int]) -> tuple[str, ...]:
        """Return the document id of each of these lines (from 0); nothing if the corpus names no documents."""
        return tuple(self.documents[line] for line in lines) if self.documents_named else ()


def open_corpus(where: str, languages: Iterable[str], key: str = KEY) -> Corpus:
    """Open the corpus `where` (see the top of the file), reading only the columns of `languages` (>= 1).

    Raises CorpusError, naming `key`, when it does not exist, lacks a language, or has columns of unequal length,
    an empty line or a malformed row.
    """
    wanted = tuple(dict.fromkeys(languages))
    assert wanted, "open_corpus needs a language"

    def fault(remedy: str) -> CorpusError:
        return CorpusError(key, repr(where), remedy)

    columns = _columns(where, fault)
    if missing := [code for code in wanted if code not in columns]:
        raise fault(f"has no {_listed(missing)}; it has {_listed(columns)}: choose among these, or add it")
    names = (*wanted, *([DOCUMENT] if DOCUMENT in columns else []))
    values = {name: columns[name]() for name in names}
    _check_lengths({name: len(column) for name, column in values.items()}, fault)
    texts = {name: _texts(column, name, fault) for name, column in values.items()}
    blocks = (str(line // BLOCK_LINES) for line in range(len(texts[wanted[0]])))
    named = texts.pop(DOCUMENT, None)
    return Corpus(where, texts, named or tuple(blocks), documents_named=named is not None)


def held_out(corpus: Corpus) -> tuple[int, ...]:
    """Return the lines (from 0) kept for evaluation, in order of use: whole documents, at least a quarter of all.

    The choice depends on the document ids alone, not on the seed, so runs with different seeds are comparable.
    One document always stays for calibration, even if that leaves less than a quarter here.
    """
    documents = _documents(corpus)
    if len(documents) < 2:
        remedy = f"is one document; give it document ids, or more than {BLOCK_LINES} lines, to hold some out"
        raise CorpusError(KEY, repr(corpus.name), remedy)
    ordered = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    taken: list[int] = []
    for name in ordered[:-1]:
        if 4 * len(taken) >= len(corpus):
            break
        taken += documents[name]
    return tuple(taken)


@dataclass(frozen=True)
class HeldOutLines:
    """Held-out lines (from 0) in their order of use.

    Trials are ranked by `selection`; the best ones are evaluated on `confirmation`. No document has lines in both.
    """

    selection: tuple[int, ...]
    confirmation: tuple[int, ...]


def split_held_out(corpus: Corpus, confirm: bool) -> HeldOutLines:
    """Divide the held-out documents between selection and confirmation, each to the part with fewer lines so far.

    With `confirm` False all are for selection. In both parts the documents take turns: first comes the first line
    of each, then the second of each, and so on. So any number of lines comes from as many documents as possible,
    since lines of one document are not independent.
    """
    documents: dict[str, list[int]] = {}
    for line in held_out(corpus):
        documents.setdefault(corpus.documents[line], []).append(line)
    selection: list[list[int]] = []
    confirmation: list[list[int]] = []
    for lines in documents.values():
        to_selection = not confirm or sum(map(len, selection)) <= sum(map(len, confirmation))
        (selection if to_selection else confirmation).append(lines)
    return HeldOutLines(_in_turns(selection), _in_turns(confirmation))


def _in_turns(documents: Sequence[Sequence[int]]) -> tuple[int, ...]:
    turns = zip_longest(*documents)
    return tuple(line for turn in turns for line in turn if line is not None)


def measuring_lines(corpus: Corpus, count: int) -> tuple[int, ...]:
    """Return at most `count` lines (from 0) that are not held out, evenly spaced over the corpus."""
    kept = set(held_out(corpus))
    rest = [line for line in range(len(corpus)) if line not in kept]
    count = min(count, len(rest))
    return tuple(rest[n * len(rest) // count] for n in range(count))


def calibration_lines(corpus: Corpus, seed: int) -> tuple[int, ...]:
    """Return the lines (from 0) that are not held out: documents shuffled by `seed`, lines of each in order."""
    kept = set(held_out(corpus))
    rest = [lines for lines in _documents(corpus).values() if lines[0] not in kept]
    random.Random(seed).shuffle(rest)
    return tuple(line for lines in rest for line in lines)


def _documents(corpus: Corpus) -> dict[str, list[int]]:
    """Document id -> its lines, ascending; documents in order of first appearance, wherever their lines are."""
    documents: dict[str, list[int]] = {}
    for line, name in enumerate(corpus.documents):
        documents.setdefault(name, []).append(line)
    return documents


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name for name in names if name != DOCUMENT) or "no language"


def _check_lengths(lengths: Mapping[str, int], fault: Fault) -> None:
    first, count = next(iter(lengths.items()))
    if not count:
        raise fault("has no lines")
    for name, length in lengths.items():
        if length != count:
            remedy = f"{first} has {count} lines and {name} has {length}; line n of each must say the same"
            raise fault(remedy)


def _texts(values: Sequence[object], name: str, fault: Fault) -> tuple[str, ...]:
    """Return the column as strings; document ids may be numbers. A blank line is an error.

    Blank lines are not skipped: otherwise the lines that a run uses would depend on the languages that it
    requests.
    """
    texts = []
    for number, value in enumerate(values, 1):
        value = str(value) if name == DOCUMENT and isinstance(value, int) else value
        texts.append(checked_text(value, number, name, fault))
        if not texts[-1].strip():
            raise fault(f"line {number} of {name} is empty; remove the line from every language")
    return tuple(texts)


def _columns(where: str, fault: Fault) -> Columns:
    """Detect the form of a corpus and return its columns. Local files take precedence over the hub."""
    path = SAMPLE if where == "sample" else Path(where)
    if path.is_dir():
        return _dataset(where, fault) if is_saved(path, fault) else _folder(path, fault)
    if path.is_file() and path.suffix not in _FILE_READERS:
        raise fault("not a corpus; give a folder of aligned fr.txt, hi.txt, ..., or a .tsv or .jsonl file")
    if path.is_file():
        return _FILE_READERS[path.suffix](path, fault)
    if path.suffix in _FILE_READERS or where.startswith(PATH_STARTS):
        raise fault("no such file or folder")
    return _dataset(where, fault)


def _folder(path: Path, fault: Fault) -> Columns:
    files = {file.stem: file for file in sorted(path.glob("*.txt")) if _is_code(file.stem)}
    if (ids := path / "DOCUMENT_IDS.tsv").exists():
        files[DOCUMENT] = ids
    return {name: partial(read_lines, file, fault) for name, file in files.items()}


def _is_code(stem: str) -> bool:
    """Return whether a file's name can be a language's code; README.txt and the like are not."""
    return len(stem) in (2, 3) and stem.isalpha() and stem.islower()


def _dataset(where: str, fault: Fault) -> Columns:
    instead = "a folder or file of parallel text"
    dataset = read_dataset(where, lambda loaded: loaded.with_format(None), fault, instead)
    names = dataset.column_names
    columns: dict[str, Callable[[], Sequence[object]]] = {
        name: partial(_dataset_column, dataset, name) for name in names if name != TRANSLATION
    }
    if TRANSLATION in names and len(dataset):
        columns |= {code: partial(_translations, dataset, code) for code in dataset[0][TRANSLATION]}
    return columns


def _dataset_column(dataset: "Dataset", name: str) -> list[object]:
    return list(dataset[name][:])


def _translations(dataset: "Dataset", code: str) -> list[object]:
    """Return one language of a column of dicts, the form of opus and wmt."""
    return members(dataset[TRANSLATION][:], code)
