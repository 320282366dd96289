"""Writes a variant as an ordinary Hugging Face checkpoint, layer by layer, with a manifest that describes it.

Dropped weights are zeros, so `from_pretrained` loads it without mlprune. The folder is complete or absent: it is
written under a temporary name and then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from mlprune.console import size_text
from mlprune.errors import StorageError
from mlprune.models.hollow import meta_model
from mlprune.models.quantization import remove_quantization
from mlprune.models.quiet import quiet_transformers
from mlprune.models.source import ModelSource
from mlprune.models.vocabulary import cut_tokenizer, renumber_config, tokenizer_values
from mlprune.planning.model_size import ModelSize
from mlprune.storage.files import check_folder

FILE_BYTES = 2 * 2**30  # size of one weights file; a layer is never split
NAME_BYTES = 255  # longest folder name on every common file system
# files of a tokenizer in other forms, which would have the whole vocabulary
SLOW_TOKENIZERS = ("vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
MARGIN_BYTES = 64 * 2**20  # tokenizer, configuration, overhead of the file system


def check_output(output: Path, weight_bytes: int) -> None:
    """Raise StorageError unless a checkpoint of `weight_bytes` can be written to the new folder `output`."""
    if len(os.fsencode(output.name)) > NAME_BYTES:
        raise StorageError("--output", repr(str(output)), "the name is too long; name another folder")
    check_folder(output.parent, "--output", output)
    if os.path.lexists(output):
        raise StorageError("--output", repr(str(output)), "exists already; name a new folder")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free, need = shutil.disk_usage(parent).free, weight_bytes + MARGIN_BYTES
    if free < need:
        remedy = f"the checkpoint takes {size_text(need)} and {size_text(free)} are free; free some space"
        raise StorageError("--output", repr(str(output)), remedy)


@dataclass(frozen=True)
class WrittenSize:
    """The weights of a written checkpoint; those that two modules share are counted once."""

    parameters: int
    bytes: int

    @classmethod
    def of_dense(cls, model: ModelSize) -> WrittenSize:
        """Return the size of a model as it is."""
        return cls(model.total // model.dtype.itemsize, model.total)


def write_checkpoint(
    source: ModelSource,
    config: PretrainedConfig,
    weights: Iterable[dict[str, Tensor]],
    manifest: Mapping[str, object],
    output: Path,
    progress: Callable[[int], None] = lambda _: None,
    vocabulary: Sequence[int] | None = None,
) -> WrittenSize:
    """Write weights, tokenizer, configuration and `mlprune.json` to the new folder `output`.

    `config` is that of the written model, with its dtype. `weights` are pieces of the model with the names of the
    loaded model; `progress` is called with the number of pieces written. The size is added to the manifest.
    `vocabulary`: only these tokens (ids, ascending) are written, renumbered; all if None.
    """
    with _complete_or_absent(output) as folder:
        if vocabulary is not None:
            weights = _with_tokens(config, weights, vocabulary)
            changes = {"vocab_size": len(vocabulary), **renumber_config(config.to_dict(), vocabulary)}
            config = type(config).from_dict({**config.to_dict(), **changes})
        files = _WeightFiles(folder)
        for number, piece in enumerate(_as_saved(config, weights), start=1):
            files.add(piece)
            progress(number)
        files.finish()
        remove_quantization(config)
        with quiet_transformers():
            config.save_pretrained(folder)
            source.tokenizer().save_pretrained(folder)
        if (generation := source.folder / "generation_config.json").exists():
            shutil.copy(generation, folder)
        if vocabulary is not None:
            _cut_saved_tokenizer(folder, source, vocabulary)
        manifest = {**manifest, "size": vars(files.size)}
        (folder / "mlprune.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return files.size


def _with_tokens(
    config: PretrainedConfig, pieces: Iterable[dict[str, Tensor]], vocabulary: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Yield the pieces with these rows alone of the embedding and the head."""
    model, rows = meta_model(config), torch.tensor(vocabulary)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    ours = {id(parameter) for end in ends for parameter in end.parameters()}
    names = {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in ours}
    for piece in pieces:
        yield {name: tensor[rows] if name in names else tensor for name, tensor in piece.items()}


def _cut_saved_tokenizer(folder: Path, source: ModelSource, vocabulary: Sequence[int]) -> None:
    """Rewrite the files of the tokenizer in `folder`, and the ids in `generation_config.json`."""
    for name in SLOW_TOKENIZERS:
        (folder / name).unlink(missing_ok=True)
    values = cut_tokenizer(tokenizer_values(source), vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False))
    new = {str(old): str(number) for number, old in enumerate(vocabulary)}
    for name in ("tokenizer_config.json", "generation_config.json"):
        file = folder / name
        if not file.exists():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        content |= renumber_config(content, vocabulary)
        if "added_tokens_decoder" in content:
            tokens = content["added_tokens_decoder"]
            content["added_tokens_decoder"] = {new[old]: token for old, token in tokens.items() if old in new}
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    output = output.absolute()
    partial = output.with_name(f".mlprune-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except OSError as error:
        raise StorageError("--output", repr(str(output)), f"could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_saved(config: PretrainedConfig, pieces: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield each piece with the names and shapes of the family's checkpoints (e.g. experts one by one)."""
    model = meta_model(config)
    seen: set[str] = set()
    for piece in pieces:
        new = {name: tensor for name, tensor in piece.items() if name not in seen}
        seen |= new.keys()
        yield revert_weight_conversion(model, new) if new else {}


class _WeightFiles:
    """Weight files of bounded size, and their index. Files are renamed once their number is known."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # tensor names, a list a file
        self.size = WrittenSize(0, 0)

    def add(self, piece: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in piece.values())
        if self._pending and size + sum(tensor.nbytes for tensor in self._pending.values()) > FILE_BYTES:
            self._flush()
        self._pending |= piece
        numbers = sum(tensor.numel() for tensor in piece.values())
        self.size = WrittenSize(self.size.parameters + numbers, self.size.bytes + size)

    def _flush(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._pending.items()}
        save_file(tensors, self._folder / f"part-{len(self._files)}", {"format": "pt"})
        self._files.append(list(tensors))
        self._pending = {}

    def finish(self) -> None:
        self._flush()
        count = len(self._files)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            part = self._folder / f"part-{number}"
            part.chmod(0o644)
            part.rename(self._folder / name)
        if count > 1:
            weight_map = {
                tensor: name for name, tensors in zip(names, self._files, strict=True) for tensor in tensors
            }
            index = {"metadata": {"total_size": self.size.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
