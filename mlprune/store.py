"""What outlives a process: dense moments and the results of trials, by content hash.

    moments/<hash of model fingerprint, calibration set and dtype>/layer-0007.safetensors
    results/<hash of all that a trial's numbers depend on>.json, and items/<the same>.json

Moments are one file a layer, so that any number of shards reads them, and carry a checksum. Every file is
written whole or not at all.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlprune.errors import StorageError
from mlprune.pruning.moments import Moments
from mlprune.variants import Variant

FORMAT = "2"  # another one, and nothing that an older version computed is taken for the same


class CorruptMomentsError(Exception):
    """A file of moments does not hold what was written to it."""


class MomentStore:
    """The moments of one model in one dtype, under `root`."""

    def __init__(self, root: Path, fingerprint: str, dtype: str) -> None:
        self._root, self._model = root, f"{FORMAT} {fingerprint} {dtype}"

    def file(self, calibration_key: str, layer: int) -> Path:
        key = hashlib.sha256(f"{self._model} {calibration_key}".encode()).hexdigest()[:32]
        return self._root / key / f"layer-{layer:04d}.safetensors"

    def save(self, calibration_key: str, layer: int, moments: Mapping[str, Moments]) -> None:
        """Write a layer's moments: matrix name -> Moments."""
        assert all(seen.gram_II is None for seen in moments.values()), "products of channels are never stored"
        tensors = {name: seen.sumsq_I.cpu().clone() for name, seen in moments.items()}
        tokens = {name: seen.tokens for name, seen in moments.items()}
        metadata = {"tokens": json.dumps(tokens), "sha256": _checksum(tensors, tokens)}
        write_whole(self.file(calibration_key, layer), safetensors.torch.save(tensors, metadata))

    def load(self, calibration_key: str, layer: int) -> dict[str, Moments] | None:
        """What was saved, or None if nothing was. Raises CorruptMomentsError when the checksum does not match."""
        file = self.file(calibration_key, layer)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            tokens = json.loads(metadata["tokens"])
            intact = metadata["sha256"] == _checksum(tensors, tokens)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptMomentsError(str(file)) from error
        if not intact:
            raise CorruptMomentsError(str(file))
        return {name: Moments(tokens[name], tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Result:
    """What a finished trial came to. `variant` is None for the dense model."""

    key: str
    variant: Variant | None
    metrics: Mapping[str, float]
    digest: str = ""  # of the masks
    unseen: tuple[str, ...] = ()  # matrices of experts that no calibration token reached


class ResultStore:
    """Finished trials under `root`: of each, its metrics in one JSON file and what it answered in another.

    What was answered (text of `evaluation/items.py`) may be many megabytes: it is read when it is asked for.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def items_file(self, key: str) -> Path:
        return self._root / "items" / f"{key}.json"

    def items(self, key: str) -> str:
        """What a finished trial answered."""
        return self.items_file(key).read_text(encoding="utf-8")

    def save(self, result: Result, items: str) -> None:
        """The file of metrics comes last: when it is there, the trial has finished."""
        write_whole(self.items_file(result.key), items.encode())
        content = json.dumps(asdict(result), indent=1, sort_keys=True)
        write_whole(self._root / "results" / f"{result.key}.json", content.encode())

    def load(self, key: str) -> Result | None:
        """The result, or None if the trial has not finished (a file that cannot be read is no result)."""
        try:
            values = json.loads((self._root / "results" / f"{key}.json").read_text())
            variant = Variant(**values["variant"]) if values["variant"] else None
            found = Result(key, variant, values["metrics"], values["digest"], tuple(values["unseen"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return found if self.items_file(key).exists() else None


def _checksum(tensors: Mapping[str, Tensor], tokens: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(tokens.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    """Write a file so that it is there whole or not at all, whoever dies or writes beside us."""
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
