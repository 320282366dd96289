"""Storage: files in a local folder or an object store, each written whole or not at all.

What the files hold is known to `moments`, `results` and `lock`, not here.

A local file is written beside its name, synced to the disk, and renamed. In an object store one PUT does all of
this: the object exists once the PUT has succeeded and not before, and of two PUTs at the same time one wins.
Object stores that are not known to behave like this are refused.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlprune.errors import StorageError
from mlprune.spec.urls import scheme_only, storage_has_secret

# Protocol (also the name of our extra that installs it) -> fsspec implementation. gcsfs has two; this is the plain
# one, because the other lists objects in zonal buckets before they are complete.
IMPLEMENTATIONS = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs.core", "GCSFileSystem"),
    "memory": ("fsspec.implementations.memory", "MemoryFileSystem"),
}
# The version of everything that is stored, part of all keys: another version, and nothing older is read again.
FORMAT = "2"
# what parsing JSON, and reading values out of it, raises if it is not what was written
DAMAGED_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Storage:
    """A local folder (an absolute path), or an address: `s3://bucket/folder`, `gs://bucket/folder`.

    `memory://x` exists in this process alone, for tests. File names are relative paths that stay inside the
    storage. Failures of the storage itself raise StorageError, which names the address.
    """

    address: str

    def __post_init__(self) -> None:
        _check_address(self.address, "storage")

    def __str__(self) -> str:
        return self.address

    @property
    def folder(self) -> Path | None:
        """The folder of a local storage; None for an object store."""
        return None if "://" in self.address else Path(self.address)

    def read(self, name: str) -> bytes:
        """Return the file's content. Raises FileNotFoundError if the file does not exist."""
        path = self._path(name)
        with storage_errors("storage", self.address):
            if isinstance(path, Path):
                return path.read_bytes()
            return _file_system(self.address).cat_file(path)

    def size(self, name: str) -> int:
        """Return the file's size in bytes. Raises FileNotFoundError if the file does not exist."""
        path = self._path(name)
        with storage_errors("storage", self.address):
            if isinstance(path, Path):
                return path.stat().st_size
            return _file_system(self.address).info(path)["size"]

    def exists(self, name: str) -> bool:
        """Return whether the file exists."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def write_whole(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, even if this process is killed or another one writes the same file."""
        path = self._path(name)
        try:
            with storage_errors("storage", self.address):
                if isinstance(path, Path):
                    write_whole(path, content)
                else:
                    _file_system(self.address).pipe_file(path, content)
        except FileNotFoundError:
            raise StorageError("storage", self.address, "no longer exists; create it again") from None

    def _path(self, name: str) -> Path | str:
        parts = name.split("/")
        # Names also come out of stored files, which anybody may have written.
        if "\0" in name or {"", ".", ".."} & set(parts):
            raise StorageError("storage", self.address, f"{name!r} is not the name of a file inside the storage")
        return f"{self.address.rstrip('/')}/{name}" if self.folder is None else self.folder.joinpath(*parts)


def write_whole(file: Path, content: bytes) -> None:
    """Write a local file whole or not at all, even if this process is killed or another one writes the same file.

    Missing parent folders are created. Raises OSError. Everything in mlprune that must not be read half written
    goes through here.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())  # otherwise a power cut may leave the new name with no content
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def check_storage(address: str, key: str = "storage") -> None:
    """Raise StorageError unless `address` can be read and written. Creates nothing and leaves nothing behind."""
    _check_address(address, key)
    if "://" not in address:
        check_folder(Path(address), key, address)
        return
    if address.startswith("memory://"):
        return
    probe = f"{address.rstrip('/')}/probe-{uuid.uuid4().hex}"
    try:
        with storage_errors(key, address):
            _file_system(address).exists(probe)
            # Start an upload and abort it: this needs the same permission as a PUT, and no object ever appears.
            upload = _file_system(address).open(probe, "wb", autocommit=False)
            upload.write(b"probe")
            upload.close()
            upload.discard()
    except FileNotFoundError:
        raise StorageError(key, address, "the bucket does not exist; create it, or name another one") from None


def check_folder(folder: Path, key: str, value: object) -> None:
    """Raise StorageError unless `folder` is a writable folder or can be created. `key` and `value` name it."""
    existing = folder.absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
    except OSError as error:  # e.g. the name is too long
        raise StorageError(key, repr(str(value)), f"cannot be created: {error.strerror}") from None
    if not existing.is_dir():
        raise StorageError(key, repr(str(value)), f"{existing} is not a folder; use another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(key, repr(str(value)), f"{existing} is not writable; use another path")


@contextmanager
def storage_errors(key: str, address: str) -> Iterator[None]:
    """Turn failures of a storage into StorageError. FileNotFoundError passes through unchanged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError:
        remedy = f"needs a package: pip install 'mlprune[{address.partition('://')[0]}]'"
        raise StorageError(key, address, remedy) from None
    except Exception as error:  # an object store raises exceptions of three different libraries
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            space = f"no space left{_free_text(address)}"
            remedy = f"{space}; free some, or use another storage; existing files are kept"
        elif "://" not in address and isinstance(error, OSError):
            remedy = f"cannot be used: {error.strerror}; fix it, or use another storage"
        elif "://" not in address:
            raise
        else:
            remedy = f"cannot be used: {_error_code(error)}; check the network and the provider's credentials"
        raise StorageError(key, address, remedy) from None


def _free_text(address: str) -> str:
    """Return how much space a folder has left: less than the file that could not be written."""
    try:
        return f" ({shutil.disk_usage(address).free:,} bytes)"
    except OSError:  # an object store, or a folder that is gone
        return ""


def _error_code(error: Exception) -> str:
    """Return an object store's error as type and code only: its text may contain secrets."""
    response = getattr(error.__cause__ or error, "response", None)  # set by botocore
    if isinstance(response, dict):
        return str(response["Error"]["Code"])
    if str(error).startswith("Forbidden"):  # raised by gcsfs
        return "Forbidden"
    return f"{type(error).__name__} {getattr(error, 'code', None) or ''}".strip()


def _check_address(address: str, key: str) -> None:
    protocol, is_remote, rest = address.partition("://")
    if not is_remote:
        return
    if storage_has_secret(address):
        remedy = "no secrets in specs; use the provider's own credentials"
        raise StorageError(key, scheme_only(address), remedy)
    if protocol not in IMPLEMENTATIONS:
        remedy = "unknown kind of storage; use a folder, s3://bucket/folder or gs://bucket/folder"
        raise StorageError(key, address, remedy)
    if not rest.strip("/"):
        raise StorageError(key, address, f"names no bucket; write {protocol}://bucket/folder")


class _Upload(Protocol):
    """An upload that has been started, and becomes an object only when it is committed."""

    def write(self, data: bytes) -> int: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


class _FileSystem(Protocol):
    """The methods of an fsspec file system that are used here."""

    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def info(self, path: str) -> dict[str, int]: ...
    def exists(self, path: str) -> bool: ...
    def open(self, path: str, mode: str, *, autocommit: bool) -> _Upload: ...


def _file_system(address: str) -> _FileSystem:
    """Return the fsspec file system; fsspec keeps one per process and thread."""
    protocol = address.partition("://")[0]
    if protocol == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs its errors in full, secrets included
    module, name = IMPLEMENTATIONS[protocol]
    # No listings cache: other processes write to the same place.
    file_system: _FileSystem = getattr(importlib.import_module(module), name)(use_listings_cache=False)
    return file_system
