"""`mlprune measure`: how large and how fast models are, with plain transformers on this machine's device.

Each measurement runs in a process of its own, so that its peak of memory is that of one model. The models take
turns within a round, so that a change in the machine's speed affects all of them alike; reported are medians over
the rounds.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mlprune.errors import SpecError
from mlprune.models.memory import peak_memory
from mlprune.models.quantization import loading_options
from mlprune.models.quiet import quiet_transformers
from mlprune.models.source import ModelSource, find_model
from mlprune.models.tensor_check import check_tensors
from mlprune.planning.machine import this_machine, usable_cores

PROMPT, WRITTEN = 512, 64  # tokens: of the text that is read, and written one by one
REPEATS = 3  # of each timing in a process; the first time takes longer, and is outvoted


@dataclass(frozen=True)
class Measurement:
    """The size and the speed of one model. Sizes are in bytes, speeds in tokens per second of one text."""

    model: str
    parameters: int
    disk: int  # its weight files
    memory: int  # peak: on the GPU, or what the process has allocated on the host
    prefill: float  # reading a text of PROMPT tokens
    decode: float  # writing the next WRITTEN tokens one by one


def measure(
    models: Sequence[str], rounds: int, progress: Callable[[int], None] = lambda _: None
) -> list[Measurement]:
    """Return the measurements of the models, in their order.

    `progress` is called with the number of processes that are done. Before any measurement, raises ModelError if a
    model cannot be read, SpecError if it takes too few tokens.
    """
    sources = [find_model(name) for name in models]
    for source in sources:
        check_tensors(source)
        positions = getattr(source.config().get_text_config(), "max_position_embeddings", None)
        if positions is not None and positions < PROMPT + WRITTEN:
            remedy = f"takes {positions} tokens at most; {PROMPT + WRITTEN} are measured"
            raise SpecError("MODEL", repr(source.name), remedy)
    device, taken = this_machine().device.type, []
    for number in range(rounds * len(sources)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            taken.append(process.submit(_measure, sources[number % len(sources)], device).result())
        progress(number + 1)
    return [_median(taken[first :: len(sources)]) for first in range(len(sources))]


def _median(rounds: Sequence[Measurement]) -> Measurement:
    first = rounds[0]
    return Measurement(
        first.model,
        first.parameters,
        first.disk,
        int(median(one.memory for one in rounds)),
        median(one.prefill for one in rounds),
        median(one.decode for one in rounds),
    )


def _measure(source: ModelSource, device: str) -> Measurement:
    """Load the model and time it. Called in a process of its own."""
    torch.set_num_threads(usable_cores())
    before = peak_memory()
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype="auto", use_safetensors=True, **loading_options(source.config())
        )
    model.eval().to(device)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        prefill = median(_prefill_seconds(model, ids) for _ in range(REPEATS))
        decode = median(_decode_seconds(model, ids) for _ in range(REPEATS))
    on_gpu = device == "cuda"
    return Measurement(
        model=source.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        disk=sum(Path(file).stat().st_size for file in source.weight_files()),
        memory=int(torch.cuda.max_memory_allocated()) if on_gpu else peak_memory() - before,
        prefill=PROMPT / prefill,
        decode=WRITTEN / decode,
    )


def _prefill_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """Return how long the model takes to read the text."""
    return _seconds(lambda: model(input_ids=ids, logits_to_keep=1), ids.device)


def _decode_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """Return how long the model takes to write WRITTEN tokens after the text, greedily, with a cache."""
    read = model(input_ids=ids, logits_to_keep=1, use_cache=True)

    def write() -> None:
        past, last = read.past_key_values, read.logits[:, -1:].argmax(-1)
        for _ in range(WRITTEN):
            out = model(input_ids=last, past_key_values=past, use_cache=True)
            past, last = out.past_key_values, out.logits[:, -1:].argmax(-1)

    return _seconds(write, ids.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
