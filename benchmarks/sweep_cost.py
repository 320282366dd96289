"""Compare the cost of a sweep with its lower bound and with llm-compressor, all in one run.

    python benchmarks/sweep_cost.py --llmcompressor PYTHON

PYTHON is an interpreter with llm-compressor (see llmcompressor_wanda.py); without it, (d) is left out. The model
is the demo model unless `--model` names another. Nothing is evaluated, and loading the model is not timed.

(a) a dense sweep of 12 variants, 2 calibrations x 3 sparsities x 2 scores, of 32 prompts of 256 tokens, from an
    empty store: both calibration sets pass the model once, and the masks of each distinct variant are made
    (magnitude needs no calibration: 9 of the 12)
(b) its lower bound: bare forward passes of transformers' own model, without its head, over the same batches; and
    12 times the bare arithmetic of one variant's masks: score and selection, by topk or by ours, whichever is
    faster
(c) one sequential prune
(d) llm-compressor's Wanda, on the same tokens and sparsity, in a process of its own

Ratios are of medians over the rounds. (a) to (d) take turns within a round, so that a change in the machine's
speed affects all of them alike.
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

from mlprune.models.hollow import decoder_layers, layer_count
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
    """Gather the moments of all calibration sets, also where the workers have them, and make every mask."""
    pipeline.gather(list(prepared.sets.values()))
    for variant in variants:
        make_masks(prepared, pipeline, variant)
        pipeline.release(variant.key)


@torch.inference_mode()
def bare_forwards(model: PreTrainedModel, prepared: Prepared) -> None:
    for calibration in prepared.sets.values():
        for batch in calibration.batches:
            model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@torch.inference_mode()
def bare_masks(model: PreTrainedModel, by_topk: bool) -> None:
    for layer in decoder_layers(model, layer_count(model.config))[1]:
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


def measure(
    python: str | None, model_path: str, rounds: int, prompts: int, tokens: int, storage: Path
) -> dict[str, list[float]]:
    """Return the seconds of each part in each round; of (d) only if `python`, its interpreter, is named."""
    sizes = [f"calibration.samples={prompts}", f"calibration.max_tokens={tokens}"]
    spec = load_spec("quickstart", [*SETTINGS, *sizes, f"model.path={model_path}", f"storage={storage}"])
    variants = variants_of(spec.search, spec.calibration.seed)
    prepared = prepare(spec, [*variants, SEQUENTIAL], evaluate=False)
    ids = torch.tensor([prompt.ids for prompt in prepared.set_of("translation:en-fr").prompts])
    assert ids.shape == (prompts, tokens)
    save_file({"input_ids": ids}, storage / "ids.safetensors")
    model = AutoModelForCausalLM.from_pretrained(prepared.source.folder).eval()
    times: dict[str, list[float]] = {name: [] for name in ("a", "b forwards", "b masks", "c", "d")}
    with open_local(prepared) as pipeline:
        bare_forwards(model, prepared)  # both copies of the weights are in memory before anything is timed
        make_masks(prepared, pipeline, SEQUENTIAL)
        for _ in range(rounds):
            for file in (storage / "moments").rglob("*.safetensors"):
                file.unlink()
            times["a"].append(seconds(lambda: dense_sweep(prepared, pipeline, variants)))
            times["b forwards"].append(seconds(lambda: bare_forwards(model, prepared)))
            masks = (seconds(lambda: bare_masks(model, True)), seconds(lambda: bare_masks(model, False)))
            times["b masks"].append(12 * min(masks))
            times["c"].append(seconds(lambda: make_masks(prepared, pipeline, SEQUENTIAL)))
            if python:
                times["d"].append(llmcompressor(python, prepared.source.folder, storage / "ids.safetensors"))
    return {name: values for name, values in times.items() if values}


@click.command()
@click.option("--llmcompressor", "python", metavar="PYTHON", help="An interpreter with llm-compressor.")
@click.option("--model", default="demo", help="A model folder, a Hugging Face model id, or demo (the default).")
@click.option("--rounds", default=3)
@click.option("--prompts", default=32, help="Prompts of each calibration set.")
@click.option("--tokens", default=256, help="Tokens of each prompt.")
def main(python: str | None, model: str, rounds: int, prompts: int, tokens: int) -> None:
    """Print the seconds of each part, a line each, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        times = measure(python, model, rounds, prompts, tokens, Path(folder))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        click.echo(f"{f'({name})':15} {', '.join(f'{value:.2f}' for value in values)} s")
    lower_bound = medians["b forwards"] + medians["b masks"]
    click.echo(f"(a) / (b)       {medians['a'] / lower_bound:.3f}   aim: at most 1.25")
    if "d" in medians:
        click.echo(f"(a) / 12 (d)    {medians['a'] / medians['d'] / 12:.3f}   aim: at most {1 / 9:.3f}")
        click.echo(f"(c) / (d)       {medians['c'] / medians['d']:.3f}   aim: at most 0.85")


if __name__ == "__main__":
    main()
