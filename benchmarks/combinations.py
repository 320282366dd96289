"""Measure what each further language costs: the calibration passes, and the masks that combine the languages.

    python benchmarks/combinations.py

For each number of languages it prints the seconds of the passes over monolingual text, and of one variant's masks
by each combination, relative to the masks of Wanda on one text. Combinations share the passes.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from mlprune.shards.pipeline import Pipeline
from mlprune.spec.loading import parse_spec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import open_local

LANGUAGES = ("en", "fr", "de", "es", "hi", "sw", "zh", "ru", "ar", "ja", "ko", "vi", "th", "tr")  # of the sample
COMBINATIONS = ("mix", "max", "power=8", "variance=1", "rank")


def variant_of(calibration: str) -> Variant:
    return parse_variant(calibration, "wanda", 0.5, "unstructured", "dense")


def prepare_job(model: str, languages: Sequence[str], samples: int, tokens: int, storage: Path) -> Prepared:
    values = {
        "model": {"path": model},
        "pipeline": {"shards": 1},
        "calibration": {"samples": samples, "shots": 4, "max_tokens": tokens},
        "search": {"score": ["magnitude"], "sparsity": [0.5]},  # the variants are given below
        "storage": str(storage),
    }
    return prepare(parse_spec(values), [variant_of(f"mono:{code}") for code in languages], evaluate=False)


def seconds_of_masks(job: Prepared, pipeline: Pipeline, variant: Variant, rounds: int) -> float:
    """Return the seconds of making the variant's masks, the median over the rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        make_masks(job, pipeline, variant)
        seconds.append(time.perf_counter() - started)
        pipeline.release(variant.key)
    return statistics.median(seconds)


def measure(job: Prepared, languages: Sequence[str], rounds: int) -> str:
    """Return the columns of one number of languages."""
    single = [variant_of(f"mono:{code}") for code in languages]
    with open_local(job) as pipeline:
        started = time.perf_counter()
        gather_moments(job, pipeline, single)
        passes = time.perf_counter() - started
        base = seconds_of_masks(job, pipeline, single[0], rounds)
        ratios = []
        for combination in COMBINATIONS:
            variant = variant_of(f"{combination}:" + ",".join(f"mono:{code}" for code in languages))
            ratios.append(f"{combination} {seconds_of_masks(job, pipeline, variant, rounds) / base:.2f}")
    return f"passes {passes:.1f} s, masks of wanda {base:.2f} s; relative to them {', '.join(ratios)}"


@click.command()
@click.option("--model", default="demo", help="A model folder, a Hugging Face model id, or demo (the default).")
@click.option("--counts", default="2,6,14", help="Numbers of languages of the sample corpus.")
@click.option("--samples", default=32, help="Prompts of each calibration set.")
@click.option("--tokens", default=256, help="Tokens of a prompt, at most.")
@click.option("--rounds", default=3)
def main(model: str, counts: str, samples: int, tokens: int, rounds: int) -> None:
    """Print one line for each number of languages."""
    for count in map(int, counts.split(",")):
        languages = LANGUAGES[:count]
        with tempfile.TemporaryDirectory() as storage:
            job = prepare_job(model, languages, samples, tokens, Path(storage))
            click.echo(f"{count:2} languages  {measure(job, languages, rounds)}")


if __name__ == "__main__":
    main()
