"""The fingerprint of a model's content, and the cache of file hashes that makes it cheap to compute again.

Stored moments and masks are named by the fingerprint, so it must stay byte-identical between versions of mlprune.

A cached hash is used again while size, times and samples of the file's content are unchanged. The modification
time alone does not show other weights: `rsync -t` and archives restore it, images and Nix set it to a constant.
The time of the last status change (ctime) cannot be set, and shows every change of a file on an ordinary disk.
In squashfs images and on network file systems it may be the modification time: there, the samples show other
weights. The inode is not compared, since such file systems may number files anew with every mount.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mlprune.models.demo import cache_folder
from mlprune.storage.files import write_whole

CACHE_FILE = "fingerprints.json"  # path of a file -> [*state, SHA-256]
SAMPLES, SAMPLE_BYTES = 64, 4096  # spread evenly over a file; a file of 256 KiB or less is compared whole

logger = logging.getLogger(__name__)


def fingerprint(config_file: Path, files: Sequence[Path]) -> str:
    """Return 32 hex digits of the content of the config and of `files`, with their names, in their order."""
    digest = hashlib.sha256(config_file.read_bytes())
    for path, content in zip(files, _file_hashes(files), strict=True):
        digest.update(f"{path.name}\0{path.stat().st_size}\0{content}\n".encode())
    return digest.hexdigest()[:32]


def _file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, from the cache where path and state are unchanged."""
    cached = _cached_hashes()
    hashes, new = [], {}
    for path in files:
        state = _state(path)
        key = str(path.resolve())
        entry = cached.get(key)
        if not (isinstance(entry, list) and entry[:-1] == state):
            logger.debug("hashing %s", path)
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            new[key] = entry
        hashes.append(str(entry[-1]))
    if new:
        _cache_hashes({**cached, **new})
    return hashes


def _state(path: Path) -> list[object]:
    """Return what differs between a file and another one in its place: size, times, and a hash of samples."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256()
        for sample in range(SAMPLES):
            file.seek(max(0, status.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest.hexdigest()[:32]]


def _cached_hashes() -> dict[str, object]:
    try:
        cached = json.loads((cache_folder() / CACHE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # absent or damaged: the hashes are computed again
        return {}
    return cached if isinstance(cached, dict) else {}


def _cache_hashes(hashes: dict[str, object]) -> None:
    """Write the cache whole. Of two concurrent writers one wins; the other's hashes are computed again."""
    with contextlib.suppress(OSError):  # without a writable cache, hashing is slow and still correct
        write_whole(cache_folder() / CACHE_FILE, json.dumps(hashes).encode())
