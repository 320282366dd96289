"""ResultStore: finished trials, each as a JSON file of metrics and a JSON file of answers.

    results/<hash of all that a trial's numbers depend on>.json
    items/<the same hash>-<hash of the answers>.json

How results are computed and ranked is not known here. Every file is written whole or not at all, and its checksum
is in it or in the file that names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from mlprune.errors import StorageError
from mlprune.spec.variants import Variant
from mlprune.storage.files import DAMAGED_JSON, Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A finished trial. `variant` is None for the dense model."""

    key: str
    variant: Variant | None
    metrics: Mapping[str, float]
    digest: str = ""  # content hash of the masks
    unseen: tuple[str, ...] = ()  # expert matrices that no calibration token reached


@dataclass(frozen=True)
class _Stored:
    """What a result's file holds: the result, and which answers belong to it."""

    result: Result
    items_bytes: int
    items_sha256: str

    @property
    def items_name(self) -> str:
        return f"items/{self.result.key}-{self.items_sha256[:16]}.json"


class ResultStore:
    """Finished trials, by their result key.

    The answers (JSON text made by `evaluation/items.py`) may be many megabytes, so they are read only on request.
    Their file is named by its content. Two drivers that finish the same trial at the same time, on machines that
    round differently, therefore leave one result and the answers that belong to it, whichever writes last.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def save(self, result: Result, items: str) -> None:
        """Write a result and its answers. The metrics are written last: once they exist, the trial is finished."""
        content = items.encode()
        stored = _Stored(result, len(content), _sha256(content))
        values = _to_dict(stored)
        text = json.dumps({**values, "sha256": _checksum(values)}, indent=1, sort_keys=True)
        self._storage.write_whole(stored.items_name, content)
        self._storage.write_whole(_result_name(result.key), text.encode())

    def load(self, key: str) -> Result | None:
        """Return the result; None if the trial has not finished, or its files are damaged or incomplete.

        Only the size of the answers is checked here; `items` checks their content.
        """
        try:
            stored = self._read(key)
            complete = self._storage.size(stored.items_name) == stored.items_bytes
        except FileNotFoundError:
            return None
        except DAMAGED_JSON as error:
            logger.debug("ignoring the damaged result %s: %r", key, error)
            return None
        return stored.result if complete else None

    def items(self, key: str) -> str:
        """Return the answers of a finished trial. Raises StorageError if they are missing or damaged."""
        name = _result_name(key)
        try:
            stored = self._read(key)
            name = stored.items_name
            content = self._storage.read(name)
            if _sha256(content) == stored.items_sha256:
                return content.decode()
        except (FileNotFoundError, *DAMAGED_JSON):
            pass
        remedy = "is damaged or missing; delete it and run the same command again"
        raise StorageError("storage", f"{self._storage}/{name}", remedy)

    def _read(self, key: str) -> _Stored:
        """Read a result's file. Raises one of DAMAGED_JSON if it is not what was written."""
        values = json.loads(self._storage.read(_result_name(key)))
        checksum = values.pop("sha256")
        if checksum != _checksum(values) or values["key"] != key:
            raise ValueError("the checksum or the key does not match")
        variant = Variant.from_dict(values["variant"]) if values["variant"] else None
        result = Result(key, variant, values["metrics"], values["digest"], tuple(values["unseen"]))
        return _Stored(result, values["items"]["bytes"], values["items"]["sha256"])


def _to_dict(stored: _Stored) -> dict[str, object]:
    result = stored.result
    return {
        "key": result.key,
        "variant": result.variant.to_dict() if result.variant else None,
        "metrics": dict(result.metrics),
        "digest": result.digest,
        "unseen": result.unseen,
        "items": {"bytes": stored.items_bytes, "sha256": stored.items_sha256},
    }


def _result_name(key: str) -> str:
    return f"results/{key}.json"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checksum(values: Mapping[str, object]) -> str:
    return _sha256(json.dumps(values, sort_keys=True).encode())
