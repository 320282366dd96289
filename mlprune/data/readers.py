"""Readers of text files, tables, JSON lines and Hugging Face datasets. Malformed input is one error of one line.

What the columns mean is not decided here: see `corpora`, `code` and `questions`.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlprune.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
PATH_STARTS = ("/", "./", "../", "~")  # a name that begins like this is never looked for on the Hugging Face hub

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one; UTF-8 cannot

# The columns of a source by name; each is read only when it is called.
Columns = Mapping[str, Callable[[], Sequence[object]]]
# Takes a remedy and returns the error; the key and the value are already in it.
Fault = Callable[[str], CorpusError]


def read_text(path: Path, fault: Fault) -> str:
    """Return a file's text, verbatim except for a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise fault(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise fault(f"{path.name} is not UTF-8 at byte {error.start}; convert it") from error


def read_lines(path: Path, fault: Fault) -> list[str]:
    r"""Return a file's lines, without the line end, which may be CRLF.

    Lines end at "\n" and nowhere else: `str.splitlines` would also cut at U+2028 and the like, which news text
    has inside sentences. That would push a language out of line with the others.
    """
    text = read_text(path, fault)
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise fault(f"{path.name} is empty; write a line for every line of text")
    return [line.removesuffix("\r") for line in lines]


def tsv_columns(path: Path, fault: Fault) -> Columns:
    """Read plain tab-separated text under a header. A quotation mark is a character like any other."""
    header, *rows = (line.split("\t") for line in read_lines(path, fault))
    if len(set(header)) < len(header):
        raise fault(f"the header of {path.name} names a column twice")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            remedy = f"row {number} below the header has {len(row)} columns; the header has {len(header)}"
            raise fault(remedy)
    return {name: partial(_cells, rows, index) for index, name in enumerate(header)}


def _cells(rows: Sequence[Sequence[str]], index: int) -> list[str]:
    return [row[index] for row in rows]


def jsonl_columns(path: Path, fault: Fault) -> Columns:
    """Read a file of one JSON object per line; the keys of the first object are the columns."""
    rows = jsonl_rows(path, fault, '{"en": "...", "fr": "..."}')
    return {name: partial(members, rows, name) for name in rows[0]}


def jsonl_rows(path: Path, fault: Fault, example: str) -> list[dict[str, object]]:
    """Return the objects of a file of one JSON object per line. `example` shows one in the error message."""
    return [_json_object(line, number, fault, example) for number, line in enumerate(read_lines(path, fault), 1)]


def _json_object(line: str, number: int, fault: Fault, example: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise fault(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise fault(f"line {number} cannot be read as JSON: {error}") from error
    if not isinstance(row, dict):
        raise fault(f"line {number} is not an object; write {example}")
    return row


def members(rows: Sequence[Mapping[str, object]], name: str) -> list[object]:
    """Return the values of one key. A row without the key gives None, as a dataset does: an empty line."""
    return [row.get(name) for row in rows]


def is_saved(path: Path, fault: Fault) -> bool:
    """Return whether `datasets.save_to_disk` wrote the folder. Raises for a folder of several splits."""
    if (path / "dataset_dict.json").exists():
        raise fault(f"holds several splits; give the folder of one, as {path / 'train'}")
    return any((path / name).exists() for name in ("state.json", "dataset_info.json"))


def read_dataset(
    where: str, read: "Callable[[Dataset], T]", fault: Fault, instead: str, streaming: bool = False
) -> T:
    """Return `read(dataset)` of the dataset `where`: a saved folder, or ID[:CONFIG][@SPLIT] of Hugging Face.

    This is the only use of `datasets`, which is imported here because the import takes seconds and most runs do
    not need it. `instead` names, in the error message, what else the user can give. `streaming`: no more is
    downloaded than is read.
    """
    import datasets

    source, _, split = where.partition("@")
    name, _, config = source.partition(":")
    if not Path(where).is_dir():
        _check_no_builder(name, fault, instead)
    try:
        if Path(where).is_dir():
            return read(datasets.load_from_disk(where))
        with _without_retries_shown(where):
            dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
            return read(dataset)
    except Exception as error:  # many unrelated types: from the hub, the network, the builder, pyarrow
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = f"cannot be loaded as a Hugging Face dataset ({reason:.200}); check its name, config and split, "
        raise fault(f"{remedy}or give {instead}") from error


@contextmanager
def _without_retries_shown(where: str) -> Iterator[None]:
    """Say once that the hub is asked: its library warns of every attempt that fails, for half a minute."""
    logger.info("opening the Hugging Face dataset %s", where)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _check_no_builder(name: str, fault: Fault, instead: str) -> None:
    """Refuse the names of the library's builders for files, which are no datasets.

    A builder without files reads those of the working directory, and in versions before 5.2 `pandas` unpickled
    them, which runs their code.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise fault(f"is a file format of the library datasets, not a dataset; give OWNER/NAME, or {instead}")


def checked_text(value: object, number: int, name: str, fault: Fault) -> str:
    """Return a value of the column `name` as text that can be written as UTF-8; None becomes the empty text."""
    if value is not None and not isinstance(value, str):
        raise fault(f"line {number} of {name} is {type(value).__name__}, not text")
    if value and _SURROGATE.search(value):
        raise fault(f"line {number} of {name} has half a character; correct its \\ud... escapes")
    return value or ""
