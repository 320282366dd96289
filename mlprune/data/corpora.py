"""Parallel text: the same lines in several languages, opened from any of five forms.

    sample                      the corpus that ships with mlprune (NTREX-128, 14 languages, 600 lines)
    FOLDER                      fr.txt, hi.txt, ... aligned by line number; DOCUMENT_IDS.tsv if there is one
    FOLDER                      of one split, written by `datasets.save_to_disk`
    FILE.tsv, FILE.jsonl        a column (a key) a language; `document` if there is one
    ID[:CONFIG][@SPLIT]         a Hugging Face dataset: a column a language, or one `translation` column

Lines end at "\\n" and nowhere else: `str.splitlines` would also cut at U+2028 and the like, which news
text has inside sentences, and so push a language out of line with the others.

Calibration and evaluation never share a document: neighbouring sentences give each other away, so a split
by line would let what calibration saw leak into the score.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlprune.errors import CorpusError

T = TypeVar("T")
SAMPLE = Path(__file__).parent / "sample"
KEY = "calibration.corpus"
DOCUMENT = "document"
TRANSLATION = "translation"  # a column of dicts, language -> text
# Without document ids this many neighbouring lines count as one, since neighbours share their context.
BLOCK_LINES = 10

PATH_STARTS = ("/", "./", "../", "~")  # what begins so is never looked for on the hub

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one; UTF-8 cannot

# What a source has, each column read only when it is called for: language (or "document") -> its values.
_Columns = Mapping[str, Callable[[], Sequence[object]]]
# Remedy in, error out: the key and the corpus are already in it.
Fault = Callable[[str], CorpusError]


@dataclass(frozen=True)
class Corpus:
    """Parallel text. All columns, and `documents`, are of one length; no line is empty."""

    name: str  # as the user wrote it
    lines: Mapping[str, Sequence[str]]  # language code -> its lines
    documents: tuple[str, ...]  # of each line

    def __len__(self) -> int:
        return len(self.documents)

    def column(self, language: str, key: str) -> Sequence[str]:
        """The lines in one language. Raises CorpusError, naming `key`, when it was not opened."""
        if language not in self.lines:
            raise CorpusError(
                key, repr(language), f"not in the corpus {self.name!r}; it has {_listed(self.lines)}"
            )
        return self.lines[language]


def open_corpus(where: str, languages: Iterable[str], key: str = KEY) -> Corpus:
    """Opens the corpus `where` (see the top of the file), reading the columns of `languages` (>= 1) only.

    Raises CorpusError, naming `key`, when it is not there, lacks a language, or has columns of unequal
    length, an empty line or a malformed row.
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
    documents = texts.pop(DOCUMENT, None) or tuple(blocks)
    return Corpus(where, texts, documents)


def held_out(corpus: Corpus) -> tuple[int, ...]:
    """Lines (from 0) kept for evaluation, in order of use: whole documents, at least a quarter of the lines.

    Which documents is a matter of their ids alone, not of the seed, so runs with different seeds compare.
    One document always stays for calibration, though that may leave less than a quarter here.
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


def calibration_lines(corpus: Corpus, seed: int) -> tuple[int, ...]:
    """Lines (from 0) of the documents not held out: documents shuffled by `seed`, lines in order in each."""
    kept = set(held_out(corpus))
    rest = [lines for lines in _documents(corpus).values() if lines[0] not in kept]
    random.Random(seed).shuffle(rest)
    return tuple(line for lines in rest for line in lines)


def _documents(corpus: Corpus) -> dict[str, list[int]]:
    """The lines of each document, ascending; documents by first appearance, wherever their lines are."""
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
    """The column as strings; document ids may be numbers. A line that says nothing is refused.

    Refused, not skipped: otherwise the lines that a run uses would depend on the languages that it asks for.
    """
    texts = []
    for number, value in enumerate(values, 1):
        value = str(value) if name == DOCUMENT and isinstance(value, int) else value
        texts.append(checked_text(value, number, name, fault))
        if not texts[-1].strip():
            raise fault(f"line {number} of {name} is empty; remove the line from every language")
    return tuple(texts)


def checked_text(value: object, number: int, name: str, fault: Fault) -> str:
    """A value of the column `name` as text that has a UTF-8 form; None is empty."""
    if value is not None and not isinstance(value, str):
        raise fault(f"line {number} of {name} is {type(value).__name__}, not text")
    if value and _SURROGATE.search(value):
        raise fault(f"line {number} of {name} has half a character; mend its \\ud... escapes")
    return value or ""


def _columns(where: str, fault: Fault) -> _Columns:
    """Tells the five forms apart. What is on the disk goes before what may be on the hub."""
    path = SAMPLE if where == "sample" else Path(where)
    if path.is_dir():
        return _dataset(where, fault) if is_saved(path, fault) else _folder(path, fault)
    if path.is_file() and path.suffix not in _FILES:
        raise fault("not a corpus; give a folder of aligned fr.txt, hi.txt, ..., or a .tsv or .jsonl file")
    if path.is_file():
        return _FILES[path.suffix](path, fault)
    if path.suffix in _FILES or where.startswith(PATH_STARTS):
        raise fault("no such file or folder")
    return _dataset(where, fault)


def read_text(path: Path, fault: Fault) -> str:
    """A file's text, verbatim but for a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise fault(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise fault(f"{path.name} is not UTF-8 at byte {error.start}; convert it") from error


def _lines(path: Path, fault: Fault) -> list[str]:
    """A file's lines, without the line end, which may be CRLF."""
    text = read_text(path, fault)
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise fault(f"{path.name} is empty; write a line for every line of text")
    return [line.removesuffix("\r") for line in lines]


def _folder(path: Path, fault: Fault) -> _Columns:
    files = {file.stem: file for file in sorted(path.glob("*.txt")) if _is_code(file.stem)}
    if (ids := path / "DOCUMENT_IDS.tsv").exists():
        files[DOCUMENT] = ids
    return {name: partial(_lines, file, fault) for name, file in files.items()}


def _is_code(stem: str) -> bool:
    """Whether a file's name can be a language's code: README.txt and the like are none."""
    return len(stem) in (2, 3) and stem.isalpha() and stem.islower()


def tsv_columns(path: Path, fault: Fault) -> _Columns:
    """Plain tab-separated text under a header: a quotation mark is a character like any other."""
    header, *rows = (line.split("\t") for line in _lines(path, fault))
    if len(set(header)) < len(header):
        raise fault(f"the header of {path.name} names a column twice")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            remedy = f"row {number} below the header has {len(row)} columns; the header has {len(header)}"
            raise fault(remedy)
    return {name: partial(_cells, rows, index) for index, name in enumerate(header)}


def _cells(rows: Sequence[Sequence[str]], index: int) -> list[str]:
    return [row[index] for row in rows]


def _jsonl(path: Path, fault: Fault) -> _Columns:
    rows = jsonl_rows(path, fault, '{"en": "...", "fr": "..."}')
    return {name: partial(_members, rows, name) for name in rows[0]}


def jsonl_rows(path: Path, fault: Fault, example: str) -> list[dict[str, object]]:
    """The objects of a file that has one a line; `example` tells a user what one looks like."""
    return [_parsed(line, number, fault, example) for number, line in enumerate(_lines(path, fault), 1)]


def _parsed(line: str, number: int, fault: Fault, example: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise fault(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise fault(f"line {number} cannot be read as JSON: {error}") from error
    if not isinstance(row, dict):
        raise fault(f"line {number} is not an object; write {example}")
    return row


def _members(rows: Sequence[Mapping[str, object]], name: str) -> list[object]:
    """A row without the key counts as an empty line, as a dataset's None does."""
    return [row.get(name) for row in rows]


_FILES: Mapping[str, Callable[[Path, Fault], _Columns]] = {".tsv": tsv_columns, ".jsonl": _jsonl}


def is_saved(path: Path, fault: Fault) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder. Raises for a folder of several splits."""
    if (path / "dataset_dict.json").exists():
        raise fault(f"holds several splits; give the folder of one, as {path / 'train'}")
    return any((path / name).exists() for name in ("state.json", "dataset_info.json"))


def read_dataset(where: str, read: Callable[[Any], T], fault: Fault, instead: str, streaming: bool = False) -> T:
    """What `read` makes of the dataset `where`: a folder of a saved one, or ID[:CONFIG][@SPLIT] of the hub.

    The one door to `datasets`, imported here since it takes seconds and most runs do without. `instead` tells
    a user what else to give. `streaming`: no more is downloaded than is read.
    """
    import datasets

    source, _, split = where.partition("@")
    name, _, config = source.partition(":")
    try:
        if Path(where).is_dir():
            return read(datasets.load_from_disk(where))
        split = split or "train"
        return read(datasets.load_dataset(name, config or None, split=split, streaming=streaming))
    except Exception as error:  # of many unrelated types: the hub's, the network's, the builder's, pyarrow's
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = f"cannot be loaded as a Hugging Face dataset ({reason:.200}); check its name, config and split, "
        raise fault(f"{remedy}or give {instead}") from error


def _dataset(where: str, fault: Fault) -> _Columns:
    instead = "a folder or file of parallel text"
    dataset = read_dataset(where, lambda found: found.with_format(None), fault, instead)
    names = dataset.column_names
    columns: dict[str, Callable[[], Sequence[object]]] = {
        name: partial(_dataset_column, dataset, name) for name in names if name != TRANSLATION
    }
    if TRANSLATION in names and len(dataset):
        columns |= {code: partial(_translations, dataset, code) for code in dataset[0][TRANSLATION]}
    return columns


def _dataset_column(dataset: Any, name: str) -> list[object]:
    return list(dataset[name][:])


def _translations(dataset: Any, code: str) -> list[object]:
    """One language of a column of dicts, the form of opus and wmt."""
    return _members(dataset[TRANSLATION][:], code)
