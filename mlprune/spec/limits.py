"""Limits on the texts, paths and numbers of a spec, which may come from anybody.

What a file system, a database or a terminal cannot take is refused here, once for all keys. What the values mean
is checked where they are used.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from mlprune.errors import SpecError
from mlprune.spec.urls import scheme_only, tracking_has_secret

TEXT_LENGTH = 10_000  # characters
PATH_BYTES, PART_BYTES = 4000, 255  # of a path, and of each name in it: those of Linux, less what is appended
NAME_BYTES = 200  # of the sweep, which names files
LARGEST = 2**63 - 1  # an integer in databases and tensors
PATHS = (
    "model.path",
    "pipeline.offload_folder",
    "calibration.corpus",
    "calibration.code",
    "evaluation.xnli.data",
    "evaluation.reviews.data",
    "evaluation.task_path",
    "storage",
    "tracking.uri",
)


def check_limits(section: BaseModel, prefix: str = "") -> None:
    """Check all values of a spec, or of a section of it at `prefix`. Raises SpecError."""
    for name, value in section:
        _check_value(f"{prefix}{name}", value)


def _check_value(key: str, value: object) -> None:
    if isinstance(value, BaseModel):
        check_limits(value, f"{key}.")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            _check_value(f"{key}[{number}]", item)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise SpecError(key, value, f"must be at most {LARGEST}")
    elif isinstance(value, str):
        _check_text(key, value)


def _check_text(key: str, text: str) -> None:
    if any(unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t" for char in text):
        raise SpecError(key, repr(text), "has a control character; remove it")
    if len(text) > TEXT_LENGTH:
        raise SpecError(key, repr(text), f"is {len(text):,} characters; write {TEXT_LENGTH:,} at most")
    if key in PATHS and _is_too_long(text):
        raise SpecError(
            key, repr(text), f"is too long; a name has {PART_BYTES} bytes at most, a path {PATH_BYTES:,}"
        )
    if key == "name" and len(text.encode()) > NAME_BYTES:
        raise SpecError(key, repr(text), f"is too long; a name has {NAME_BYTES} bytes at most")
    if key == "tracking.uri" and not tracking_has_secret(text):  # those are refused elsewhere
        check_url(key, text)


def _is_too_long(path: str) -> bool:
    return len(path.encode()) > PATH_BYTES or any(len(part.encode()) > PART_BYTES for part in path.split("/"))


def check_url(key: str, url: str) -> None:
    """Raise SpecError, which shows no secret, if the host or port of a URL cannot be read."""
    try:
        urlsplit(url).port  # noqa: B018 - parsed when it is read
    except ValueError:  # whose message has a part of the URL
        raise SpecError(key, repr(scheme_only(url)), "not a URL: its host or port is invalid") from None


def absolute_path(path: str, key: str) -> str:
    """Return a folder's path made absolute, with ~ replaced. Raises SpecError, naming `key`."""
    if not path.strip():
        raise SpecError(key, repr(path), "must not be empty")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # of pathlib
        raise SpecError(key, repr(path), "names no user of this machine") from None
