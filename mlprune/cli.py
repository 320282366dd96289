"""The command line: each command builds a spec, calls one function and prints what it returns.

Heavy imports stand inside the commands, so that `--help` and mistyped options respond at once.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from mlprune.errors import MlpruneError, SpecError, StorageError, Terminated, UserError
from mlprune.runtime.restarts import forbid_restarts

if TYPE_CHECKING:
    from mlprune.remote.job_package import JobPackage
    from mlprune.spec.schema import SweepSpec

Values = dict[str, object]  # a command's result, as --json writes it
VERBOSITY = {"quiet": -1, "normal": 0, "verbose": 1}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlprune")
def main() -> None:
    """Prune multilingual language models, and find the calibration text that preserves your languages best."""


def _command(function: Callable[..., Values]) -> click.Command:
    """Turn a function into a command with the common options; an error of the user becomes one line."""

    @functools.wraps(function)
    def run(debug: bool, verbosity: str, json_file: str | None, **options: object) -> None:
        from mlprune.console import configure_logging

        configure_logging(VERBOSITY[verbosity])
        signal.signal(signal.SIGTERM, _terminate)
        try:
            _check_json(json_file)
            values = function(**options)
        except (KeyboardInterrupt, Terminated) as stop:
            _stopped(stop)
        except UserError as error:
            _fail(error, debug, 2)
        except MlpruneError as error:
            _fail(error, debug, 1)
        else:
            if json_file is not None:
                _write_json(json_file, values)
            if values.get("failed"):  # some trials of a sweep failed; the results of the others are written
                sys.exit(1)

    decorated: Callable[..., None] = run
    for option in reversed(_COMMON_OPTIONS):
        decorated = option(decorated)
    return main.command(name=function.__name__)(decorated)


_COMMON_OPTIONS = (
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of the spec; may be repeated."
    ),
    click.option(
        "--json", "json_file", metavar="FILE", help="Write the result as JSON to FILE; - is standard output."
    ),
    click.option(
        "-v", "--verbose", "verbosity", flag_value="verbose", default="normal", help="Print debug messages too."
    ),
    click.option(
        "-q", "--quiet", "verbosity", flag_value="quiet", help="Print only warnings and errors; no progress."
    ),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
_corpus = click.option(
    "--corpus", metavar="PATH", help="Parallel text: sample, a folder, a file, or a Hugging Face dataset."
)
_base_spec = click.option(
    "--spec", default="quickstart", show_default=True, help="The spec that provides all other settings."
)
_new_folder = click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")


def _check_json(file: str | None) -> None:
    """Raise StorageError before any work if the result cannot be written; with `-`, print tables on stderr."""
    from mlprune import console

    console.results.stderr = file == "-"
    if file not in (None, "-"):
        path = Path(file)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise StorageError("--json", repr(file), "name a file in an existing folder")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise StorageError("--json", repr(file), "not writable; name another file")


def _terminate(signum: int, frame: object) -> None:
    forbid_restarts()
    signal.signal(signum, signal.SIG_IGN)  # the second one would interrupt what the first one cleans up
    raise Terminated


def _stopped(stop: KeyboardInterrupt | Terminated) -> NoReturn:
    """Exit as shells expect of a process that a signal ends."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    click.echo(f"mlprune: stopped by {number.name}; run the same command to resume", err=True)
    sys.exit(128 + number)


def _fail(error: MlpruneError, debug: bool, code: int) -> None:
    if debug:
        raise error
    click.echo(f"mlprune: {' '.join(str(error).split())}", err=True)
    sys.exit(code)


def _write_json(file: str, values: Values) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False)
    if file == "-":
        click.echo(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def _load_spec(name: str, assignments: tuple[str, ...], settings: Mapping[str, object]) -> SweepSpec:
    """Load the spec `name`; apply the options in `settings` and then every --set."""
    from mlprune.spec.loading import load_spec, to_assignments

    return load_spec(name, [*to_assignments(settings), *assignments])


@_command
@click.argument("spec", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan; run nothing.")
@click.option("--cluster", metavar="FILE", help="Run on the cluster that `ray up FILE` started.")
@click.option("--attach", is_flag=True, help="Watch the cluster's running sweep again, or else its last one.")
@_corpus
def sweep(
    spec: str | None,
    dry_run: bool,
    cluster: str | None,
    attach: bool,
    corpus: str | None,
    assignments: tuple[str, ...],
) -> Values:
    """Run a sweep of pruning variants.

    SPEC is a YAML file, or the name of a sweep that comes with mlprune (default: quickstart). An interrupted
    sweep resumes where it stopped: run the same command again.
    """
    if cluster is not None:
        from mlprune.remote.ssh import check_cluster_file

        check_cluster_file(cluster)
    if attach:
        if cluster is None or spec or dry_run or corpus or assignments:
            raise SpecError(
                "--attach", "given", "use it with --cluster FILE, and with no option other than --json"
            )
        return _watch(cluster, None)
    spec = spec or "quickstart"
    checked = _load_spec(spec, assignments, {"calibration.corpus": corpus})
    if cluster is not None:
        from mlprune.remote.job_package import package_job
        from mlprune.spec.loading import to_assignments

        options = [*to_assignments({"calibration.corpus": corpus}), *assignments]
        return _watch(cluster, package_job(spec, checked, options, dry_run))
    from mlprune.report import sweep as report
    from mlprune.report.live import live_view
    from mlprune.report.page import description
    from mlprune.sweep.plan import plan_sweep
    from mlprune.sweep.sweep import run_sweep

    if dry_run:
        plan = plan_sweep(checked)
        report.show_plan(plan)
        return report.plan_values(plan)
    with live_view() as show:
        outcome = run_sweep(checked, show, description)
    report.show_outcome(outcome)
    return report.outcome_values(outcome)


def _watch(file: str, package: JobPackage | None) -> Values:
    """Submit a sweep to the cluster (None: find the one there), watch it, and return its result."""
    from mlprune.remote import jobs as remote

    context = click.get_current_context()
    cluster = context.with_resource(remote.connect(file))
    code, values = cluster.watch(cluster.latest() if package is None else cluster.start(package))
    if code != remote.INTERRUPTED:
        context.call_on_close(cluster.keep_tunnel_open)  # after the result has been written
    if values is None:
        sys.exit(code)
    return values


@_command
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
@_new_folder
@_corpus
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
) -> Values:
    """Prune a model and write the checkpoint to a new folder.

    MODEL is a folder, a Hugging Face model id, or demo. By default, the inputs of a layer come from the
    pruned layers before it (--propagation sequential).
    """
    from mlprune.commands import prune as command

    options = command.VariantOptions(calibration, score, sparsity, pattern, allocation, propagation, repair)
    settings = {"model.path": model, "calibration.corpus": corpus}
    if run_id is not None:
        if spec is not None:
            raise SpecError("--spec", repr(spec), "the run determines the spec; leave out --spec or --run")
        checked, variant = command.select_run(run_id, options, settings, assignments)
    else:
        checked, variant = command.select_variant(spec or "quickstart", options, settings, assignments)
    pruned = command.prune(checked, variant, output)
    concerned = "the weights"
    if variant.pattern.structure:
        concerned += f" of the matrices with {variant.pattern.structure}"
    click.echo(f"{variant.label}: {pruned.sparsity:.2%} of {concerned} dropped", err=True)
    click.echo(command.size_line(pruned), err=True)
    click.echo(f"written to {output}; evaluate it with: mlprune evaluate {shlex.quote(str(output))}", err=True)
    return pruned.manifest


@_command
@click.argument("runs", nargs=2, metavar="RUN RUN")
def compare(runs: tuple[str, str], assignments: tuple[str, ...]) -> Values:
    """Compare two trials of sweeps, item by item.

    Each RUN is an MLflow run id; the second is compared with the first. For each task and language: the
    difference, its 95% confidence interval, and whether it is significant.
    """
    from mlprune.commands.compare import compare_runs
    from mlprune.report import comparison as report

    comparison = compare_runs(_load_spec("quickstart", assignments, {}), runs)
    report.show_comparison(comparison)
    return report.comparison_values(comparison)


@_command
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
@_corpus
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
    checked = _load_spec(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
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


def _parse_size(option: str, text: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if text is None else int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SpecError(option, repr(text), "write a size, e.g. 80GiB") from None


@_command
@click.argument("model")
@_base_spec
@click.option("--languages", metavar="LIST", help="ISO 639 codes of languages in the corpus, e.g. en,fr.")
@_corpus
def evaluate(
    model: str, spec: str, languages: str | None, corpus: str | None, assignments: tuple[str, ...]
) -> Values:
    """Evaluate a model on held-out lines.

    MODEL is a folder, a Hugging Face model id, or demo. Prints perplexity and bits per byte of each
    language, and the metrics of the spec's other tasks.
    """
    codes = [code.strip() for code in languages.split(",")] if languages is not None else None
    settings = {
        "model.path": model,
        "calibration.corpus": corpus,
        "evaluation.perplexity.languages": codes,
    }
    checked = _load_spec(spec, assignments, settings)
    from mlprune.commands.evaluate import evaluate_checkpoint
    from mlprune.report import sweep as report

    metrics = evaluate_checkpoint(checked)
    report.show_metrics(model, checked.evaluation.perplexity.languages, metrics)
    return {"model": model, "metrics": dict(metrics)}


@_command
@click.argument("model")
@_base_spec
@click.option(
    "--languages", required=True, metavar="LIST", help="ISO 639 codes of languages in the corpus, e.g. en,fr,hi."
)
@click.option(
    "--pivot", default="en", show_default=True, help="The language of all translations, source or target."
)
@click.option(
    "--layer", type=int, help="Layer whose single channels are drawn, 0: the embedding.  [default: the middle one]"
)
@click.option("--ratio", default=0.3, show_default=True, help="Share of channels counted as top, and as bottom.")
@click.option("--sparsity", default=0.5, show_default=True, help="Sparsity of the compared masks.")
@_new_folder
@_corpus
def analyze(
    model: str,
    spec: str,
    languages: str,
    corpus: str | None,
    assignments: tuple[str, ...],
    output: Path,
    pivot: str,
    layer: int | None,
    ratio: float,
    sparsity: float,
) -> Values:
    """Analyze which hidden channels each calibration uses.

    MODEL is a folder, a Hugging Face model id, or demo. Compares monolingual text of each language with
    translations from and to the pivot: how large each channel is, how top and bottom channels overlap, and
    how much of Wanda's mask two calibrations share.
    """
    checked = _load_spec(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
    from mlprune.commands.analyze import AnalysisRequest
    from mlprune.commands.analyze import analyze as study
    from mlprune.report import analysis as report

    codes = tuple(dict.fromkeys(code.strip() for code in languages.split(",")))
    result = study(checked, AnalysisRequest(codes, pivot, layer, ratio, sparsity), output)
    report.show_analysis(result)
    return report.analysis_values(result)


@_command
@click.option(
    "--cluster", metavar="FILE", help="Show the sweeps on the head of the cluster that `ray up FILE` started."
)
def status(cluster: str | None, assignments: tuple[str, ...]) -> Values:
    """Show the sweeps that run on this machine.

    For each sweep: active trials, shards and remaining time.
    """
    if assignments:
        raise SpecError("--set", repr(assignments[0]), "status reads no spec; leave it out")
    if cluster is not None:
        from mlprune.remote import jobs as remote

        values: Values = remote.cluster_status(cluster)
        return values
    from mlprune.report import live as report
    from mlprune.sweep.status import running_sweeps

    sweeps = running_sweeps()
    report.show_running(sweeps)
    return report.running_values(sweeps)
