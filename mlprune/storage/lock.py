"""sweep_lock: at most one driver per sweep, in a local storage.

Object stores have no locks; see `sweep_lock`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import filelock

from mlprune.errors import StorageError
from mlprune.storage.files import Storage, storage_errors


@contextmanager
def sweep_lock(storage: Storage, key: str) -> Iterator[None]:
    """Hold the lock of the sweep `key` for the block. Raises StorageError while another driver holds it.

    The operating system releases the lock when its process ends, however it ends. An object store has no such
    lock (a lock file written by a driver that was killed would stay), so nothing is locked there: two drivers of
    one sweep then do its work twice, and each stored file is still whole.
    """
    if storage.folder is None:
        yield
        return
    file, holder_name = storage.folder / "locks" / f"{key}.lock", f"locks/{key}.json"
    # a soft lock, which is only a file, would outlive its process
    lock = filelock.FileLock(file, timeout=0, fallback_to_soft=False)
    with storage_errors("storage", storage.address):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            remedy = f"this sweep is already running ({_holder(storage, holder_name)}); see mlprune status"
            raise StorageError("storage", storage, remedy) from None
        except FileNotFoundError:  # e.g. in /proc, whatever its permissions say
            raise StorageError("storage", storage, "cannot be created there; use another path") from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        storage.write_whole(holder_name, json.dumps(holder).encode())
        yield
        (storage.folder / holder_name).unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(storage: Storage, name: str) -> str:
    """Describe the process that holds the lock."""
    try:
        holder = json.loads(storage.read(name))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # locked a moment ago, or damaged
        return "in another process"
