"""Measure a calibration pass and the masks of one variant for each residency: resident, zero/cpu and zero/nvme.

Run it on the demo model:

    python benchmarks/residency.py

Run it on a model of Llama's architecture with random weights in bfloat16, built for the benchmark:

    python benchmarks/residency.py --width 4096 --layers 32 --tokens 65536 --peak 989e12

`--peak` is the device's peak FLOP/s; with it each row also says which share of the peak the pass reaches.
"""

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from mlprune.errors import SpecError
from mlprune.models.demo import demo_folder
from mlprune.planning.machine import this_machine
from mlprune.spec.loading import parse_spec
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local

WANDA = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")
PROMPT_TOKENS = 256
RESIDENCIES = {
    "resident": {"residency": "resident"},
    "zero/cpu": {"residency": "zero", "offload": "cpu"},
    "zero/nvme": {"residency": "zero", "offload": "nvme"},
}


def build_model(width: int, layers: int, folder: Path) -> Path:
    """Save a model of Llama's architecture with random weights and the demo model's tokenizer."""
    heads = width // 128
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=49152,
    )
    with this_machine().device:  # drawing billions of random weights on the CPU takes minutes
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(folder)
    return folder


def prepare_job(model: str, tokens: int, storage: Path, pipeline: dict[str, str]) -> Prepared:
    """Prepare calibration on prompts of `tokens` tokens altogether, and nothing to evaluate."""
    values = {
        "model": {"path": model},
        "pipeline": pipeline,
        "calibration": {"samples": tokens // PROMPT_TOKENS, "shots": 4, "max_tokens": PROMPT_TOKENS},
        "search": {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]},
        "storage": str(storage),
    }
    return prepare(parse_spec(values), [WANDA], evaluate=False)


def measure(job: Prepared, rounds: int) -> tuple[float, float]:
    """Return the seconds of a pass over the calibration set and of making the masks, medians over the rounds."""
    passes, masks = [], []
    (calibration,) = job.sets.values()
    with open_local(job) as pipeline:
        gather_moments(job, pipeline, [WANDA])  # the first pass is slower: it is not timed
        for _ in range(rounds):
            started = time.perf_counter()
            pipeline.gather([calibration])
            passes.append(time.perf_counter() - started)
            started = time.perf_counter()
            make_masks(job, pipeline, WANDA)
            masks.append(time.perf_counter() - started)
    return statistics.median(passes), statistics.median(masks)


def row(job: Prepared, pass_seconds: float, mask_seconds: float, base: float, peak: float | None) -> str:
    """Return a residency's line of the table, without its name. `base` is the first residency's pass."""
    tokens = sum(calibration.tokens for calibration in job.sets.values())
    moved = sum(job.model_size.layers) / pass_seconds / 1e9
    line = (
        f"pass {pass_seconds:.2f} s, {pass_seconds / base:.2f} of the first; {tokens / pass_seconds:,.0f} tokens/s"
    )
    if peak:
        line += f", {2 * tokens * job.model_size.pruned_total / pass_seconds / peak:.0%} of peak"
    return f"{line}; {moved:.1f} GB of layers/s; masks {mask_seconds:.2f} s"


@click.command()
@click.option("--model", default="demo", help="A model folder, a Hugging Face model id, or demo (the default).")
@click.option("--width", type=int, help="Build a model of this hidden size instead.")
@click.option("--layers", default=32, help="Layers of the model that --width builds.")
@click.option("--tokens", default=8192, help=f"Tokens of the calibration set, in prompts of {PROMPT_TOKENS}.")
@click.option("--rounds", default=3)
@click.option("--peak", type=float, help="Peak FLOP/s of the device.")
@click.option(
    "--residency", "names", type=click.Choice(list(RESIDENCIES)), multiple=True, default=list(RESIDENCIES)
)
def main(
    model: str,
    width: int | None,
    layers: int,
    tokens: int,
    rounds: int,
    peak: float | None,
    names: tuple[str, ...],
) -> None:
    """Print one line for each residency."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), 0.0
        path = str(build_model(width, layers, folder / "model")) if width else model
        for number, name in enumerate(names):
            try:
                job = prepare_job(path, tokens, folder / str(number), RESIDENCIES[name])
            except SpecError as error:
                if error.key != "pipeline.offload":
                    raise
                click.echo(f"{name:10} skipped: {error}")  # nvme without libaio's headers
                continue
            pass_seconds, mask_seconds = measure(job, rounds)
            base = base or pass_seconds
            click.echo(f"{name:10} {row(job, pass_seconds, mask_seconds, base, peak)}")


if __name__ == "__main__":
    main()
