"""What it costs that weights live elsewhere: a calibration pass and one variant's masks, for each residency.

    python benchmarks/residency.py                       # the demo model
    python benchmarks/residency.py --width 4096 --layers 32 --tokens 65536 --peak 989e12

With a width, a model of Llama's shape is made on the spot, in bfloat16. `--peak`: the device's FLOP/s, to say
which share of them the pass reaches.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlprune.models.demo import demo_folder
from mlprune.spec.loading import parse_spec
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local

WANDA = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")
WAYS = {
    "resident": {"residency": "resident"},
    "zero/cpu": {"residency": "zero", "offload": "cpu"},
    "zero/nvme": {"residency": "zero", "offload": "nvme"},
}


def made(width: int, layers: int, folder: Path) -> Path:
    heads = width // 128
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=49152,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(folder)
    return folder


def prepared(model: str, tokens: int, storage: Path, pipeline: dict[str, str]) -> Prepared:
    values = {
        "model": {"path": model},
        "pipeline": pipeline,
        "calibration": {"samples": tokens // 256, "shots": 4, "max_tokens": 256},
        "search": {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]},
        "storage": str(storage),
    }
    return prepare(parse_spec(values), [WANDA], evaluate=False)


def timed(job: Prepared, rounds: int) -> tuple[float, float]:
    """Seconds of a pass over the calibration set, and of the masks: medians."""
    passes, masks = [], []
    (made_set,) = job.sets.values()
    with open_local(job) as pipeline:
        gather_moments(job, pipeline, [WANDA])  # warm
        for _ in range(rounds):
            started = time.perf_counter()
            pipeline.gather([made_set])
            passes.append(time.perf_counter() - started)
            started = time.perf_counter()
            make_masks(job, pipeline, WANDA)
            masks.append(time.perf_counter() - started)
    return statistics.median(passes), statistics.median(masks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = str(made(asked.width, asked.layers, folder / "model")) if asked.width else "demo"
        base = 0.0
        for number, (name, pipeline) in enumerate(WAYS.items()):
            job = prepared(model, asked.tokens, folder / str(number), pipeline)
            seconds, masking = timed(job, asked.rounds)
            base = base or seconds
            tokens = sum(made_set.tokens for made_set in job.sets.values())
            moved = sum(job.model_size.layers) / seconds / 1e9
            line = f"{name:10} pass {seconds:.2f} s, {seconds / base:.2f} of resident"
            line += f"; {tokens / seconds:,.0f} tokens/s"
            if asked.peak:
                line += f", {2 * tokens * job.model_size.pruned_total / seconds / asked.peak:.0%} of peak"
            print(f"{line}; {moved:.1f} GB of layers/s; masks {masking:.2f} s")  # noqa: T201


if __name__ == "__main__":
    main()
