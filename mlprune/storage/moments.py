"""MomentStore: calibration moments of the dense model, one file per layer, each with a checksum.

    moments/<hash of model fingerprint, dtype and calibration set>/layer-0007.safetensors

One file per layer, so that any number of shards can read them. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mlprune.pruning.moments import Moments
from mlprune.storage.files import DAMAGED_JSON, FORMAT, Storage


class CorruptMomentsError(Exception):
    """A file of moments does not hold what was written to it."""


class MomentStore:
    """The moments of one model in one dtype."""

    def __init__(self, storage: Storage, fingerprint: str, dtype: str) -> None:
        self._storage, self._model = storage, f"{FORMAT} {fingerprint} {dtype}"

    def name(self, calibration_key: str, layer: int) -> str:
        """Return the name of a layer's file in the storage."""
        key = hashlib.sha256(f"{self._model} {calibration_key}".encode()).hexdigest()[:32]
        return f"moments/{key}/layer-{layer:04d}.safetensors"

    def has(self, calibration_key: str, layer: int) -> bool:
        """Return whether a layer's moments are stored."""
        return self._storage.exists(self.name(calibration_key, layer))

    def save(self, calibration_key: str, layer: int, moments: Mapping[str, Moments]) -> None:
        """Write a layer's moments, by matrix name."""
        assert all(matrix.gram_II is None for matrix in moments.values()), "Gram matrices are never stored"
        tensors = {name: matrix.sumsq_I.cpu().clone() for name, matrix in moments.items()}
        tokens = {name: matrix.tokens for name, matrix in moments.items()}
        metadata = {"tokens": json.dumps(tokens), "sha256": _checksum(tensors, tokens)}
        content = safetensors.torch.save(tensors, metadata)
        self._storage.write_whole(self.name(calibration_key, layer), content)

    def load(self, calibration_key: str, layer: int) -> dict[str, Moments] | None:
        """Return a layer's moments, or None if none are stored. Raises CorruptMomentsError for a damaged file."""
        name = self.name(calibration_key, layer)
        try:
            content = self._storage.read(name)
        except FileNotFoundError:
            return None
        try:
            tensors, metadata = safetensors.torch.load(content), _metadata(content)
            tokens = json.loads(metadata["tokens"])
            moments = {name: Moments(tokens[name], tensors[name]) for name in sorted(tensors)}
            intact = metadata["sha256"] == _checksum(tensors, tokens)
        except (SafetensorError, *DAMAGED_JSON) as error:
            raise CorruptMomentsError(f"{self._storage}/{name}") from error
        if not intact:
            raise CorruptMomentsError(f"{self._storage}/{name}")
        return moments


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: 8 bytes with the header's length, then the header as JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def _checksum(tensors: Mapping[str, Tensor], tokens: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(tokens.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
