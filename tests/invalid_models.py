"""What a sweep does with a model's folder up to the first tokens, for tests of invalid checkpoints."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from mlprune.models.hollow import LoadedPart, Span, load_hollow
from mlprune.models.source import find_model
from mlprune.models.tensor_check import check_tensors
from mlprune.planning.model_size import measure_model


def use_model(folder: Path) -> None:
    """Check the model as `sweep.prepare` does, load it and run it. Raises UserError where the checks refuse it.

    Whatever the checks let through must load and run: every other error is a fault of the checks.
    """
    source = find_model(str(folder))
    size = measure_model(source.config(), source.dtype("auto"), source.name)
    check_tensors(source)
    ids = source.tokenizer()("A line of text").input_ids
    source.fingerprint()
    layers = len(size.layers)
    model = load_hollow(source, LoadedPart.whole(Span(0, layers, layers)), source.dtype("auto"))
    with torch.no_grad():
        model(torch.tensor([ids]).clamp(max=size.vocabulary - 1))  # larger ids are found by `sweep.prepare`


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header, and the bytes after it."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write_header(file: Path, header: object, body: bytes, length: int | None = None) -> None:
    """Write a safetensors file; `header` as JSON, or as bytes; `length`: another one than the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
