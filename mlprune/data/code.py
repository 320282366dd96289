"""Files of program code, the other side of contrastive calibration, opened from any of five forms.

    stdlib                      the standard library of the running Python
    FOLDER                      all *.py below it
    FOLDER                      one split of a dataset, written by `datasets.save_to_disk`
    FILE.jsonl                  one object per line
    ID[:CONFIG][@SPLIT]         a Hugging Face dataset, streamed: the split by its name, without slices

In objects and datasets, the code is in the first existing column of COLUMNS. Blank files, as most `__init__.py`
are, are left out. Which files a calibration set uses is decided in `demonstrations`.
"""

import os
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlprune.data.readers import PATH_STARTS, Fault, checked_text, is_saved, jsonl_rows, read_dataset, read_text
from mlprune.errors import CorpusError

KEY = "calibration.code"
COLUMNS = ("content", "code", "text", "whole_func_string")
# Code datasets have millions of rows; only the first rows are read, and no more are downloaded from the hub.
DATASET_ROWS = 10_000
# Shorter files of the standard library mostly re-export names of others.
STDLIB_BYTES = 2048
# Folders and files of the standard library that are not ordinary code, that distributions leave out, or that the
# build writes: without them, the files of one version are the same on most machines.
NOT_STDLIB = (
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
    *("config-*", "_sysconfigdata*"),
)
_FORMS = "stdlib, a folder of .py files or a .jsonl file"


@dataclass(frozen=True)
class CodeFiles:
    """Program code. No file is blank."""

    name: str  # as the user wrote it; the standard library's name has its version, on which the files depend
    files: Sequence[tuple[str, str]]  # path, or row number from 1; and text


def open_code(where: str, key: str = KEY) -> CodeFiles:
    """Open the code `where` (see the top of the file): the files of a folder sorted by path, rows in their order.

    Raises CorpusError, naming `key`, when it does not exist, is not text or has no column of code.
    """

    def fault(remedy: str) -> CorpusError:
        return CorpusError(key, repr(where), remedy)

    if where == "stdlib":
        return CodeFiles(f"stdlib {platform.python_version()}", _stdlib(fault))
    files = [(source, text) for source, text in _files(where, fault) if text.strip()]
    return CodeFiles(where, tuple(files))


def _files(where: str, fault: Fault) -> list[tuple[str, str]]:
    """Detect the form, as `corpora` does, and read the files. Local files take precedence over the hub."""
    path = Path(where)
    if path.is_dir() and not is_saved(path, fault):
        return [(name, read_text(path / name, fault)) for name in _python_files(path, fault)]
    if path.is_file() and path.suffix != ".jsonl":
        raise fault(f"not code; give {_FORMS}")
    if path.is_file():
        return _column(jsonl_rows(path, fault, '{"content": "..."}'), fault)
    if path.suffix == ".jsonl" or (where.startswith(PATH_STARTS) and not path.is_dir()):
        raise fault("no such file or folder")
    rows = read_dataset(where, lambda dataset: list(dataset.take(DATASET_ROWS)), fault, _FORMS, streaming=True)
    return _column(rows, fault)


def _column(rows: Sequence[Mapping[str, object]], fault: Fault) -> list[tuple[str, str]]:
    names = list(rows[0]) if rows else []
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        remedy = f"has no column {', '.join(COLUMNS)}; it has {', '.join(names) or 'no row'}"
        raise fault(f"{remedy}: rename the column that holds the code")
    return [(str(n), checked_text(row.get(column), n, column, fault)) for n, row in enumerate(rows, 1)]


def _stdlib(fault: Fault) -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in _python_files(root, fault, NOT_STDLIB):
        raw = (root / name).read_bytes()
        if len(raw) >= STDLIB_BYTES and _is_utf8(raw):
            files.append((name, raw.decode()))
    return tuple(files)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _python_files(root: Path, fault: Fault, without: Sequence[str] = ()) -> list[str]:
    """Return the paths of the *.py files below `root`, relative to it and sorted.

    `without`: patterns of names to skip. Links are not followed, so that no file is listed twice and none comes
    from outside.
    """

    def wanted(name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in without)

    def refuse(error: OSError) -> None:
        raise fault(f"{error.filename} cannot be read: {error.strerror}")

    names = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = filter(wanted, folders)
        paths = [Path(folder, name) for name in files if name.endswith(".py") and wanted(name)]
        names += [path.relative_to(root).as_posix() for path in paths if not path.is_symlink()]
    return sorted(names)
