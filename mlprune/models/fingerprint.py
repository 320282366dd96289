"""The fingerprint of a model's content, and the cache of file hashes that makes it cheap to compute again.

Stored moments and masks are named by the fingerprint, so it must stay byte-identical between versions of mlprune.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mlprune.models.demo import cache_folder
from mlprune.storage.files import write_whole

CACHE_FILE = "fingerprints.json"  # path of a file -> [size, time of change, SHA-256]

logger = logging.getLogger(__name__)


def fingerprint(config_file: Path, files: Sequence[Path]) -> str:
    """Return 32 hex digits of the content of the config and of `files`, with their names, in their order."""
    digest = hashlib.sha256(config_file.read_bytes())
    for path, content in zip(files, _file_hashes(files), strict=True):
        digest.update(f"{path.name}\0{path.stat().st_size}\0{content}\n".encode())
    return digest.hexdigest()[:32]


def _file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, from the cache where path, size and time of change are unchanged."""
    cached = _cached_hashes()
    hashes, new = [], {}
    for path in files:
        status = path.stat()
        state: list[object] = [status.st_size, status.st_mtime_ns]
        key = str(path.resolve())
        entry = cached.get(key)
        if not (isinstance(entry, list) and entry[:2] == state and len(entry) == 3):
            logger.debug("hashing %s", path)
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            new[key] = entry
        hashes.append(str(entry[2]))
    if new:
        _cache_hashes({**cached, **new})
    return hashes


def _cached_hashes() -> dict[str, object]:
    try:
        cached = json.loads((cache_folder() / CACHE_FILE).read_bytes())
    except (OSError, ValueError):  # absent or damaged: the hashes are computed again
        return {}
    return cached if isinstance(cached, dict) else {}


def _cache_hashes(hashes: dict[str, object]) -> None:
    """Write the cache whole. Of two concurrent writers one wins; the other's hashes are computed again."""
    with contextlib.suppress(OSError):  # without a writable cache, hashing is slow and still correct
        write_whole(cache_folder() / CACHE_FILE, json.dumps(hashes).encode())
