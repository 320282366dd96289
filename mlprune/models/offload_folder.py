"""The folder that holds the offloaded weights of one process, and its removal after a process was killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import tempfile
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


class OffloadFolder:
    """A new folder for one process. Folders of killed processes are removed when the next one is created."""

    def __init__(self, root: Path) -> None:
        root = root / "mlprune-offload"  # a folder of ours, because what killed processes left in it is removed
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root, wait=True):  # no process may mistake a new, not yet locked folder for an abandoned one
            for abandoned in root.glob("shard-*"):
                # its process is alive, or has just removed the folder
                with contextlib.suppress(BlockingIOError, FileNotFoundError):
                    _lock(abandoned).close()
                    logger.debug("removing %s, which a killed process left", abandoned)
                    shutil.rmtree(abandoned, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix="shard-", dir=root))
            self._lock = _lock(self.path)

    def close(self) -> None:
        """Remove the folder and everything in it."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _lock(folder: Path, wait: bool = False) -> IO[str]:
    """Lock the folder until the returned file is closed or the process ends, however it ends.

    Raises BlockingIOError if another process holds the lock and `wait` is False.
    """
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    return file
