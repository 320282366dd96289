"""The commands about one model: `prune`, `trim`, `calibration`, `evaluate`, `measure` and `plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlprune.cli.command import Values, base_spec, command, corpus_option, new_folder, spec_of
from mlprune.errors import SpecError

if TYPE_CHECKING:
    from mlprune.commands.calibration import Form
    from mlprune.commands.prune import VariantOptions
    from mlprune.spec.schema import SweepSpec
    from mlprune.spec.variants import Variant


@command
@click.argument("model", required=False)
@click.option("--spec", help="The spec that provides all other settings.  [default: quickstart]")
@click.option("--run", "run_id", metavar="ID", help="Prune as a sweep's trial did: its MLflow run id.")
@click.option(
    "--calibration", metavar="KIND", help="mono:fr, translation:en-fr, code, mix:KIND=WEIGHT,... (docs/spec.md)."
)
@click.option("--score", help="wanda, magnitude, ria, sparsegpt, contrastive:KIND/KIND, ... (docs/spec.md).")
@click.option("--sparsity", type=float, help="Share of the weights to drop, in [0, 1).")
@click.option("--pattern", help="unstructured, n:m such as 2:4; channels or heads: a really smaller model.")
@click.option("--allocation", help="uniform, owl, alpha, sensitivity-worst, ... (docs/spec.md).")
@click.option("--propagation", help="sequential or dense.")
@click.option("--repair", help="none, or least-squares: of what reads removed units.")
@click.option("--vocabulary", metavar="LIST", help="Keep only the tokens of these languages, e.g. en,fr,sw.")
@click.option("--vocabulary-corpus", metavar="PATH", help="Their text.  [default: the calibration corpus]")
@new_folder
@corpus_option
def prune(
    model: str | None,
    spec: str | None,
    run_id: str | None,
    corpus: str | None,
    assignments: tuple[str, ...],
    output: Path,
    calibration: str | None,
    score: str | None,
    sparsity: float | None,
    pattern: str | None,
    allocation: str | None,
    propagation: str | None,
    repair: str | None,
    vocabulary: str | None,
    vocabulary_corpus: str | None,
) -> Values:
    """Prune a model and write the checkpoint to a new folder.

    MODEL is a folder, a Hugging Face model id, or demo. By default, the inputs of a layer come from the
    pruned layers before it (--propagation sequential).
    """
    from mlprune.commands import prune as pruning
    from mlprune.data.corpora import open_corpus

    options = pruning.VariantOptions(calibration, score, sparsity, pattern, allocation, propagation, repair)
    settings = {"model.path": model, "calibration.corpus": corpus}
    checked, variant = _selected(run_id, spec, options, settings, assignments)
    text = None
    if vocabulary is not None:
        where, key = vocabulary_corpus or checked.calibration.corpus, "--vocabulary-corpus"
        text = open_corpus(where, _codes(vocabulary, "--vocabulary"), key if vocabulary_corpus else "--vocabulary")
    elif vocabulary_corpus is not None:
        raise SpecError("--vocabulary-corpus", repr(vocabulary_corpus), "needs --vocabulary: which languages?")
    pruned = pruning.prune(checked, variant, output, text)
    concerned = "the weights"
    if variant.pattern.structure:
        concerned += f" of the matrices with {variant.pattern.structure}"
    click.echo(f"{variant.label}: {pruned.sparsity:.2%} of {concerned} dropped", err=True)
    click.echo(pruning.size_line(pruned), err=True)
    click.echo(f"written to {output}; evaluate it with: mlprune evaluate {shlex.quote(str(output))}", err=True)
    return pruned.manifest


def _codes(languages: str, option: str) -> list[str]:
    """Return the languages of a list such as `en,fr`, each once."""
    codes = [code.strip() for code in languages.split(",")]
    if not all(codes):
        raise SpecError(option, repr(languages), "write codes with commas, e.g. en,fr")
    return list(dict.fromkeys(codes))


def _selected(
    run_id: str | None,
    spec: str | None,
    options: VariantOptions,
    settings: Mapping[str, object],
    assignments: tuple[str, ...],
) -> tuple[SweepSpec, Variant]:
    """Return the spec and the variant of a run, or those that the options describe."""
    from mlprune.commands import prune as pruning

    if run_id is None:
        return pruning.select_variant(spec or "quickstart", options, settings, assignments)
    if spec is not None:
        raise SpecError("--spec", repr(spec), "the run determines the spec; leave out --spec or --run")
    return pruning.select_run(run_id, options, settings, assignments)


@command
@click.argument("model", required=False)
@click.option("--spec", help="The spec that provides all other settings.  [default: quickstart]")
@click.option("--run", "run_id", metavar="ID", help="The text of a sweep's trial: its MLflow run id.")
@click.option(
    "--calibration", "kind", metavar="KIND", help="mono:fr, translation:en-fr, mix:KIND,... (docs/spec.md)."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "messages", "tokens", "plain"]),
    default="text",
    show_default=True,
    help="JSON lines with a text, a message or token ids each; or plain text.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new file.")
@corpus_option
def calibration(
    model: str | None,
    spec: str | None,
    run_id: str | None,
    corpus: str | None,
    assignments: tuple[str, ...],
    output: Path,
    kind: str | None,
    form: Form,
) -> Values:
    """Write calibration text to a file, for other tools.

    MODEL (whose tokenizer cuts the prompts) is a folder, a Hugging Face model id, or demo. The text is that of
    a sweep's trial (--run), or of --calibration. A card beside the file says where it comes from.
    """
    from mlprune.commands import prune as pruning
    from mlprune.commands.calibration import write_calibration

    settings = {"model.path": model, "calibration.corpus": corpus}
    sparsity = 0.5 if run_id is None else None  # no text depends on it
    chosen = pruning.VariantOptions(calibration=kind, sparsity=sparsity)
    checked, variant = _selected(run_id, spec, chosen, settings, assignments)
    written = write_calibration(checked, variant, output, form)
    click.echo(f"{written.prompts} prompts, {written.tokens:,} tokens: {written.file}, {written.card}", err=True)
    return {
        "file": str(written.file),
        "card": str(written.card),
        "prompts": written.prompts,
        "tokens": written.tokens,
    }


@command
@click.argument("model")
@base_spec
@click.option("--languages", metavar="LIST", help="ISO 639 codes of languages in the corpus, e.g. en,fr.")
@corpus_option
def evaluate(
    model: str, spec: str, languages: str | None, corpus: str | None, assignments: tuple[str, ...]
) -> Values:
    """Evaluate a model on held-out lines.

    MODEL is a folder, a Hugging Face model id, or demo. Prints perplexity and bits per byte of each
    language, and the metrics of the spec's other tasks.
    """
    codes = None if languages is None else _codes(languages, "--languages")
    settings = {
        "model.path": model,
        "calibration.corpus": corpus,
        "evaluation.perplexity.languages": codes,
    }
    checked = spec_of(spec, assignments, settings)
    from mlprune.commands.evaluate import evaluate_checkpoint
    from mlprune.report import sweep as report

    metrics = evaluate_checkpoint(checked)
    report.show_metrics(model, checked.evaluation.perplexity.languages, metrics)
    return {"model": model, "metrics": dict(metrics)}


@command
@click.argument("model", required=False)
@click.option(
    "--spec", default="quickstart", show_default=True, help="The sweep to plan; MODEL replaces its model."
)
@click.option("--nodes", type=click.IntRange(1), help="Number of nodes, all of the same kind.")
@click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs per node; 0: CPU cores only.")
@click.option("--gpu-memory", metavar="SIZE", help="Memory per GPU, e.g. 80GiB.")
@click.option("--host-memory", metavar="SIZE", help="Memory per node, e.g. 1TiB.")
@click.option("--host-to-device", metavar="SIZE", help="Bytes per second from host to GPU, e.g. 25GB.")
@click.option("--flops", type=float, help="FLOP/s per GPU (without GPUs: per node), e.g. 312e12.")
@corpus_option
def plan(
    model: str | None,
    spec: str,
    corpus: str | None,
    assignments: tuple[str, ...],
    nodes: int | None,
    gpus_per_node: int | None,
    gpu_memory: str | None,
    host_memory: str | None,
    host_to_device: str | None,
    flops: float | None,
) -> Values:
    """Plan how a model fits given machines.

    Prints memory, time, and what to change if the model does not fit. MODEL is a folder, a Hugging Face
    model id, demo, or only a config.json. No weights are read. Without machine options, the machines are
    those of the running Ray cluster, or else this machine.
    """
    checked = spec_of(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
    sizes = (
        _parse_size("--gpu-memory", gpu_memory),
        _parse_size("--host-memory", host_memory),
        _parse_size("--host-to-device", host_to_device),
    )
    from mlprune.commands.plan import MachineOptions, plan_scale
    from mlprune.report import plan as report

    scale = plan_scale(checked, MachineOptions(nodes, gpus_per_node, *sizes, flops))
    report.show_scale(scale)
    return report.scale_values(scale)


@command
@click.argument("model")
@base_spec
@click.option("--languages", required=True, metavar="LIST", help="Languages of the corpus to keep, e.g. en,fr,sw.")
@new_folder
@corpus_option
def trim(
    model: str, spec: str, languages: str, corpus: str | None, assignments: tuple[str, ...], output: Path
) -> Values:
    """Keep only the tokens that some languages need.

    MODEL is a folder, a Hugging Face model id, or demo. Writes the model with a smaller vocabulary to a new
    folder. Other text is still encoded, by other tokens. Prints how much longer held-out text becomes.
    """
    settings = {
        "model.path": model,
        "calibration.corpus": corpus,
        "evaluation.perplexity.languages": _codes(languages, "--languages"),
    }
    checked = spec_of(spec, assignments, settings)
    from mlprune.commands.trim import trim as trim_model
    from mlprune.report import trim as report

    trimmed = trim_model(checked, output)
    report.show_trimmed(trimmed)
    return report.trimmed_values(trimmed)


@command
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Medians are over these."
)
def measure(models: tuple[str, ...], rounds: int, assignments: tuple[str, ...]) -> Values:
    """Measure how large and how fast models are.

    Each MODEL is a folder, a Hugging Face model id, or demo. Prints parameters, bytes on disk, peak memory, and
    tokens per second with plain transformers, and their ratios to the first model's.
    """
    if assignments:
        raise SpecError("--set", repr(assignments[0]), "measure reads no spec; leave it out")
    from mlprune.commands.measure import measure as measure_models
    from mlprune.console import step
    from mlprune.report import measure as report

    with step("measuring", "processes") as progress:
        measurements = measure_models(models, rounds, lambda done: progress(done, rounds * len(models)))
    report.show_measurements(measurements)
    return report.measurement_values(measurements)


def _parse_size(option: str, text: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if text is None else int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SpecError(option, repr(text), "write a size, e.g. 80GiB") from None
