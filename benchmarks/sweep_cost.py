"""What a sweep costs, against its floor and against llm-compressor; all in one run, on the demo model.

    python benchmarks/sweep_cost.py --llmcompressor PYTHON [--rounds 3]

PYTHON is an interpreter with llm-compressor (see llmcompressor_wanda.py). Nothing is evaluated, and loading the
model is left out everywhere.

(a) a dense sweep of 12 variants, 2 calibrations x 3 sparsities x 2 scores, of 32 prompts of 256 tokens, from an
    empty store: two passes, and the masks of each different variant (magnitude needs no calibration: 9 of the 12)
(b) its floor: two bare forward passes of transformers' own model, without its head, over the same batches, and 12
    times the bare arithmetic of one variant's masks: score and selection, by topk or by our selection, the faster
(c) one sequential prune
(d) llm-compressor's Wanda, on the same tokens and sparsity, in a process of its own

Ratios are of medians over the rounds, which take turns, so that a change in the machine's speed meets all alike.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mlprune.models.matrices import matrices
from mlprune.pruning.masks import dropped_per_row, keep_mask
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.loading import load_spec
from mlprune.spec.variants import Pattern, Variant
from mlprune.sweep.grid import parse_variant, variants_of
from mlprune.sweep.masks import make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local

SETTINGS = [
    "calibration.samples=32",
    "calibration.max_tokens=256",
    "calibration.shots=6",  # more than 256 tokens a prompt, so that all are cut to 256
    "search.calibration=['translation:en-fr','translation:en-de']",
    "search.score=[magnitude, wanda]",
    "search.sparsity=[0.3, 0.5, 0.7]",
]
SEQUENTIAL = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "sequential")


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def dense_sweep(prepared: Prepared, pipeline: Pipeline, variants: tuple[Variant, ...]) -> None:
    # not gather_moments: the workers still hold the moments of the round before
    pipeline.gather(list(prepared.sets.values()))
    for variant in variants:
        make_masks(prepared, pipeline, variant)
        pipeline.release(variant.key)


@torch.inference_mode()
def bare_forwards(model: PreTrainedModel, prepared: Prepared) -> None:
    for made in prepared.sets.values():
        for batch in made.batches:
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@torch.inference_mode()
def bare_masks(model: PreTrainedModel, by_topk: bool) -> None:
    for layer in model.base_model.layers:
        for matrix in matrices(layer).values():
            weight_OI = layer.get_parameter(matrix.parameter)
            score_OI = weight_OI.abs() * torch.ones(weight_OI.shape[1])
            if by_topk:
                lowest = score_OI.topk(dropped_per_row(weight_OI.shape[1], 0.5), largest=False, sorted=False)
                torch.ones_like(score_OI, dtype=torch.bool).scatter_(1, lowest.indices, False)
            else:
                keep_mask(score_OI, 0.5, Pattern())


def llmcompressor(python: str, model: Path, ids: Path) -> float:
    script = Path(__file__).with_name("llmcompressor_wanda.py")
    command = [python, str(script), str(model), str(ids), "--sparsity", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def measure(python: str | None, rounds: int, storage: Path) -> dict[str, list[float]]:
    spec = load_spec("quickstart", [*SETTINGS, f"storage={storage}"])
    variants = variants_of(spec.search)
    prepared = prepare(spec, [*variants, SEQUENTIAL], evaluate=False)
    ids = torch.tensor([prompt.ids for prompt in prepared.sets["translation:en-fr"].prompts])
    assert ids.shape == (32, 256)
    save_file({"input_ids": ids}, storage / "ids.safetensors")
    model = AutoModelForCausalLM.from_pretrained(prepared.source.folder).eval()
    found: dict[str, list[float]] = {name: [] for name in ("a", "b forwards", "b masks", "c", "d")}
    with open_local(prepared) as pipeline:
        bare_forwards(model, prepared)  # both copies of the weights are in memory before anything is timed
        make_masks(prepared, pipeline, SEQUENTIAL)
        for _ in range(rounds):
            for file in (storage / "moments").rglob("*.safetensors"):
                file.unlink()
            found["a"].append(seconds(lambda: dense_sweep(prepared, pipeline, variants)))
            found["b forwards"].append(seconds(lambda: bare_forwards(model, prepared)))
            masks = (seconds(lambda: bare_masks(model, True)), seconds(lambda: bare_masks(model, False)))
            found["b masks"].append(12 * min(masks))
            found["c"].append(seconds(lambda: make_masks(prepared, pipeline, SEQUENTIAL)))
            if python:
                found["d"].append(llmcompressor(python, prepared.source.folder, storage / "ids.safetensors"))
    return found


@click.command()
@click.option("--llmcompressor", "python", metavar="PYTHON", help="An interpreter with llm-compressor.")
@click.option("--rounds", default=3)
def main(python: str | None, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(python, rounds, Path(folder))
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    for name, values in found.items():
        click.echo(f"({name})  {', '.join(f'{value:.2f}' for value in values)} s")
    floor = medians["b forwards"] + medians["b masks"]
    click.echo(f"(a) / (b)       {medians['a'] / floor:.3f}   aim: at most 1.25")
    if "d" in medians:
        click.echo(f"(a) / 12 (d)    {medians['a'] / medians['d'] / 12:.3f}   aim: at most {1 / 9:.3f}")
        click.echo(f"(c) / (d)       {medians['c'] / medians['d']:.3f}   aim: at most 0.85")


if __name__ == "__main__":
    main()
