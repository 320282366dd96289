"""Temporary folders that do not stay when their process is killed: the next process removes them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

LOCK = "in-use.lock"
ATTEMPTS, PAUSE = 20, 0.1  # to empty a folder in which dying processes still write; seconds


@contextlib.contextmanager
def scratch_folder(
    prefix: str, parent: Path | None = None, before_removal: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """Create a temporary folder for the block, and remove those of this prefix that killed processes left.

    `parent` None: the system's folder for temporary files. A folder in use contains a locked file, and the
    operating system releases the lock with its process, however that ends. `before_removal` is called with each
    folder that was left.
    """
    parent = parent or Path(tempfile.gettempdir())
    for folder in parent.glob(f"{prefix}*"):
        _remove_if_unused(folder, before_removal)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with filelock.FileLock(folder / LOCK, fallback_to_soft=False):
        try:
            yield folder
        finally:
            _remove(folder)


def _remove_if_unused(folder: Path, before_removal: Callable[[Path], None]) -> None:
    if not (folder / LOCK).is_file():  # a moment ago created, or not ours
        return
    lock = filelock.FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    with contextlib.suppress(filelock.Timeout, OSError), lock:  # in use, or another user's
        before_removal(folder)
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder. If something else still writes in it, the lock file stays, and the next process tries."""
    for _ in range(ATTEMPTS):
        others = [path for path in folder.iterdir() if path.name != LOCK]
        if not others:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in others:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        time.sleep(PAUSE)
