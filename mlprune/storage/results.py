"""What outlives a process: dense moments and the results of trials, by content hash.

    moments/<hash of model fingerprint, calibration set and dtype>/layer-0007.safetensors
    results/<hash of all that a trial's numbers depend on>.json
    items/<the same>-<hash of what was answered>.json

Moments are one file a layer, so that any number of shards reads them. Every file is written whole or not at all
and carries a checksum, or is named in one that has its checksum; none is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mlprune.errors import StorageError
from mlprune.pruning.moments import Moments
from mlprune.spec.variants import Variant
from mlprune.storage.files import Storage

FORMAT = "2"  # another one, and nothing that an older version computed is taken for the same
# what reading JSON, and looking into it, raises where it is not what was written
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class CorruptMomentsError(Exception):
    """A file of moments does not hold what was written to it."""


class MomentStore:
    """The moments of one model in one dtype."""

    def __init__(self, storage: Storage, fingerprint: str, dtype: str) -> None:
        self._storage, self._model = storage, f"{FORMAT} {fingerprint} {dtype}"

    def name(self, calibration_key: str, layer: int) -> str:
        """Of a layer's file in the storage."""
        key = hashlib.sha256(f"{self._model} {calibration_key}".encode()).hexdigest()[:32]
        return f"moments/{key}/layer-{layer:04d}.safetensors"

    def has(self, calibration_key: str, layer: int) -> bool:
        return self._storage.exists(self.name(calibration_key, layer))

    def save(self, calibration_key: str, layer: int, moments: Mapping[str, Moments]) -> None:
        """Write a layer's moments: matrix name -> Moments."""
        assert all(seen.gram_II is None for seen in moments.values()), "products of channels are never stored"
        tensors = {name: seen.sumsq_I.cpu().clone() for name, seen in moments.items()}
        tokens = {name: seen.tokens for name, seen in moments.items()}
        metadata = {"tokens": json.dumps(tokens), "sha256": _checksum(tensors, tokens)}
        content = safetensors.torch.save(tensors, metadata)
        self._storage.write_whole(self.name(calibration_key, layer), content)

    def load(self, calibration_key: str, layer: int) -> dict[str, Moments] | None:
        """What was saved, or None if nothing was. Raises CorruptMomentsError when the checksum does not match."""
        name = self.name(calibration_key, layer)
        try:
            content = self._storage.read(name)
        except FileNotFoundError:
            return None
        try:
            tensors, metadata = safetensors.torch.load(content), _metadata(content)
            tokens = json.loads(metadata["tokens"])
            found = {name: Moments(tokens[name], tensors[name]) for name in sorted(tensors)}
            intact = metadata["sha256"] == _checksum(tensors, tokens)
        except (SafetensorError, *DAMAGED) as error:
            raise CorruptMomentsError(f"{self._storage}/{name}") from error
        if not intact:
            raise CorruptMomentsError(f"{self._storage}/{name}")
        return found


def _metadata(content: bytes) -> Any:
    """Of a file of safetensors: the length of its header in 8 bytes, then the header, in JSON."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@dataclass(frozen=True)
class Result:
    """What a finished trial came to. `variant` is None for the dense model."""

    key: str
    variant: Variant | None
    metrics: Mapping[str, float]
    digest: str = ""  # of the masks
    unseen: tuple[str, ...] = ()  # matrices of experts that no calibration token reached


class ResultStore:
    """Finished trials: of each, its metrics in one JSON file and what it answered in another.

    What was answered (text of `evaluation/items.py`) may be many megabytes: it is read when it is asked for. Its
    file is named by its content, so that two drivers that finish the same trial at the same time, on machines that
    round differently, leave a result and the answers to it, whichever comes last.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def save(self, result: Result, items: str) -> None:
        """The file of metrics comes last: when it is there, the trial has finished."""
        content = items.encode()
        values = asdict(result) | {"items": {"bytes": len(content), "sha256": _sha256(content)}}
        values |= {"sha256": _checksum_of(values)}
        self._storage.write_whole(_items_name(values), content)
        text = json.dumps(values, indent=1, sort_keys=True)
        self._storage.write_whole(_result_name(result.key), text.encode())

    def load(self, key: str) -> Result | None:
        """The result, or None if the trial has not finished (what is damaged or incomplete is no result).

        Of what was answered only the length is looked at.
        """
        try:
            values = self._values(key)
            variant = Variant(**values["variant"]) if values["variant"] else None
            found = Result(key, variant, values["metrics"], values["digest"], tuple(values["unseen"]))
            complete = self._storage.size(_items_name(values)) == values["items"]["bytes"]
        except (FileNotFoundError, *DAMAGED):
            return None
        return found if complete else None

    def items(self, key: str) -> str:
        """What a finished trial answered. Raises StorageError where it is not what was written."""
        name = _result_name(key)
        try:
            values = self._values(key)
            name = _items_name(values)
            content = self._storage.read(name)
            if _sha256(content) == values["items"]["sha256"]:
                return content.decode()
        except (FileNotFoundError, *DAMAGED):
            pass
        remedy = "is damaged or gone; delete it and run the same command again"
        raise StorageError("storage", f"{self._storage}/{name}", remedy)

    def _values(self, key: str) -> dict[str, Any]:
        """What the result's file holds. Raises one of DAMAGED where that is not what was written."""
        values = json.loads(self._storage.read(_result_name(key)))
        told = values.pop("sha256")
        if told != _checksum_of(values) or values["key"] != key:
            raise ValueError
        return dict(values)


def _result_name(key: str) -> str:
    return f"results/{key}.json"


def _items_name(values: Mapping[str, Any]) -> str:
    return f"items/{values['key']}-{values['items']['sha256'][:16]}.json"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checksum_of(values: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(values, sort_keys=True).encode())


def _checksum(tensors: Mapping[str, Tensor], tokens: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(tokens.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
