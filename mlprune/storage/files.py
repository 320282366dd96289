"""Where files are kept: a folder, or an object store. What is written is there whole or not at all.

In a folder a file is written beside its name, brought to the disk, and renamed. In an object store one put does
all of that: the object is there when the put has ended well and not before, and of two puts at the same time one
is the last. Stores of which we do not know this are not taken.
"""

import errno
import importlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from mlprune.errors import StorageError

# protocol, and our extra that brings it -> fsspec's implementation. Of gcsfs's two the plain one: the other shows
# objects in zonal buckets before they are whole
IMPLEMENTATIONS = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs.core", "GCSFileSystem"),
    "memory": ("fsspec.implementations.memory", "MemoryFileSystem"),
}
FULL = (errno.ENOSPC, errno.EDQUOT)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs, whole, what it raises


@dataclass(frozen=True)
class Storage:
    """A folder (an absolute path), or an address: `s3://bucket/folder`, `gs://bucket/folder`.

    `memory://x` is in this process alone, for tests. Names are relative paths and stay inside; what goes wrong in
    the place itself is a StorageError that names the address.
    """

    address: str

    def __post_init__(self) -> None:
        _check_address(self.address, "storage")

    def __str__(self) -> str:
        return self.address

    @property
    def folder(self) -> Path | None:
        """Of a local storage, else None."""
        return None if "://" in self.address else Path(self.address)

    def read(self, name: str) -> bytes:
        """The content. Raises FileNotFoundError when there is no such file."""
        place = self._place(name)
        with _told("storage", self.address):
            if isinstance(place, Path):
                return place.read_bytes()
            content: bytes = _files(self.address).cat_file(place)
            return content

    def size(self, name: str) -> int:
        """Bytes. Raises FileNotFoundError when there is no such file."""
        place = self._place(name)
        with _told("storage", self.address):
            if isinstance(place, Path):
                return place.stat().st_size
            return int(_files(self.address).info(place)["size"])

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def write_whole(self, name: str, content: bytes) -> None:
        """Write a file so that it is there whole or not at all, whoever dies or writes beside us."""
        place = self._place(name)
        try:
            with _told("storage", self.address):
                if isinstance(place, Path):
                    write_whole(place, content)
                else:
                    _files(self.address).pipe_file(place, content)
        except FileNotFoundError:
            raise StorageError("storage", self.address, "is not there any more; make it again") from None

    def _place(self, name: str) -> Path | str:
        parts = name.split("/")
        if "\0" in name or {"", ".", ".."} & set(parts):  # names come out of files too, of anybody's making
            raise StorageError("storage", self.address, f"{name!r} is no name of a file inside it")
        return f"{self.address.rstrip('/')}/{name}" if self.folder is None else self.folder.joinpath(*parts)


def check_storage(address: str, key: str = "storage") -> None:
    """Raise StorageError unless `address` can be read and written. Makes nothing and leaves nothing behind."""
    _check_address(address, key)
    if "://" not in address:
        check_place(Path(address), key, address)
        return
    if address.startswith("memory://"):
        return
    probe = f"{address.rstrip('/')}/probe-{uuid.uuid4().hex}"
    try:
        with _told(key, address):
            _files(address).exists(probe)
            # an upload that is begun and broken off: it is allowed where a put is, and no object ever appears
            upload = _files(address).open(probe, "wb", autocommit=False)
            upload.write(b"probe")
            upload.close()
            upload.discard()
    except FileNotFoundError:
        raise StorageError(key, address, "there is no such bucket; make it, or name another one") from None


def _check_address(address: str, key: str) -> None:
    protocol, remote, rest = address.partition("://")
    if not remote:
        return
    if "@" in rest or "?" in rest:
        remedy = "no secrets in specs; use the provider's own credentials"
        raise StorageError(key, f"{protocol}://...", remedy)
    if protocol not in IMPLEMENTATIONS:
        remedy = "no storage of this kind is known; name a folder, s3://bucket/folder or gs://bucket/folder"
        raise StorageError(key, address, remedy)
    if not rest.strip("/"):
        raise StorageError(key, address, f"names no bucket; write {protocol}://bucket/folder")


def _files(address: str) -> Any:
    """fsspec's file system, made once a process and thread. It remembers no listings: others write there too."""
    module, name = IMPLEMENTATIONS[address.partition("://")[0]]
    return getattr(importlib.import_module(module), name)(use_listings_cache=False)


@contextmanager
def _told(key: str, address: str) -> Iterator[None]:
    """What goes wrong in a storage as StorageError, but for files that are not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError:
        remedy = f"needs a package: pip install 'mlprune[{address.partition('://')[0]}]'"
        raise StorageError(key, address, remedy) from None
    except Exception as error:  # of an object store: any of three libraries' own
        if isinstance(error, OSError) and error.errno in FULL:
            remedy = "no space is left; free some, or name another place; what is there is kept"
        elif "://" not in address and isinstance(error, OSError):
            remedy = f"cannot be used: {error.strerror}; mend it, or name another place"
        elif "://" not in address:
            raise
        else:
            remedy = f"cannot be used: {_kind(error)}; look at the network and the provider's credentials"
        raise StorageError(key, address, remedy) from None


def _kind(error: Exception) -> str:
    """An object store's error by its kind and code alone: its text may hold what should not be shown."""
    answer = getattr(error.__cause__ or error, "response", None)  # botocore's
    if isinstance(answer, dict):
        return str(answer["Error"]["Code"])
    if str(error).startswith("Forbidden"):  # gcsfs's
        return "Forbidden"
    return f"{type(error).__name__} {getattr(error, 'code', None) or ''}".strip()


@contextmanager
def sweep_lock(storage: Storage, key: str) -> Iterator[None]:
    """Hold the sweep `key` of a local storage for the block. Raises StorageError while another driver does.

    The operating system lets go of a lock when its process ends, however it ends. An object store has nothing
    like it (what a dead driver had put there would stay), so there is no lock: two drivers of one sweep do its
    work twice, and each file is whole still.
    """
    if storage.folder is None:
        yield
        return
    place, note = storage.folder / "locks" / f"{key}.lock", f"locks/{key}.json"
    lock = filelock.FileLock(place, timeout=0, fallback_to_soft=False)  # a soft one would outlive its process
    with _told("storage", storage.address):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            who = _holder(storage, note)
            remedy = f"this sweep is running already ({who}); look at it with mlprune status"
            raise StorageError("storage", storage, remedy) from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        storage.write_whole(note, json.dumps(holder).encode())
        yield
        (storage.folder / note).unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(storage: Storage, note: str) -> str:
    try:
        holder = json.loads(storage.read(note))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # taken a moment ago
        return "in another process"


def check_place(folder: Path, key: str, value: object) -> None:
    """Raise StorageError unless `folder` is one, or can be made, and can be written to."""
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
    except OSError as error:  # a name that is too long, say
        raise StorageError(key, repr(str(value)), f"no such folder can be made: {error.strerror}") from None
    if not place.is_dir():
        raise StorageError(key, repr(str(value)), f"{place} is no folder; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(key, repr(str(value)), f"{place} cannot be written to; name another place")


def write_whole(file: Path, content: bytes) -> None:
    """Write a local file so that it is there whole or not at all, whoever dies or writes beside us."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
