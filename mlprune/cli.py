"""The command line. Commands are thin: they make a spec, call one function, and show what it returns.

Heavy imports are inside the commands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlprune.errors import MlpruneError, SpecError, StorageError, UserError

if TYPE_CHECKING:
    from mlprune.remote.job_package import Parcel
    from mlprune.spec.schema import SweepSpec

VERBOSITY = {"quiet": -1, "normal": 0, "verbose": 1}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlprune")
def main() -> None:
    """Prune multilingual language models, and find out which calibration text keeps your languages alive."""


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command of it: add --set, --json, --verbose, --quiet and --debug; print an error as one line."""

    @functools.wraps(function)
    def run(debug: bool, verbosity: str, json_file: str | None, **options: Any) -> None:
        from mlprune.console import configure_logging

        configure_logging(VERBOSITY[verbosity])
        try:
            _check_json(json_file)
            value = function(**options)
        except UserError as error:
            _fail(error, debug, 2)
        except MlpruneError as error:
            _fail(error, debug, 1)
        else:
            if json_file is not None:
                _write_json(json_file, value)
            if value.get("failed"):  # of a sweep's trials; the others are there
                sys.exit(1)

    decorators = [
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of the spec."),
        click.option(
            "--json", "json_file", metavar="FILE", help="Write the result as JSON; - is standard output."
        ),
        click.option(
            "-v",
            "--verbose",
            "verbosity",
            flag_value="verbose",
            default="normal",
            help="Print debug messages too.",
        ),
        click.option(
            "-q", "--quiet", "verbosity", flag_value="quiet", help="Print only warnings and errors; no progress."
        ),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    ]
    for decorator in reversed(decorators):
        run = decorator(run)
    return main.command(name=function.__name__)(run)


_corpus = click.option("--corpus", metavar="PATH", help="Parallel text: sample, a folder, a file, or a data set.")


def _check_json(file: str | None) -> None:
    """Before any work: whether the result can be written; with `-`, tables go to the error stream."""
    from mlprune import console

    console.results.stderr = file == "-"
    if file not in (None, "-"):
        path = Path(file)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise StorageError("--json", repr(file), "name a file in a folder that is there")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise StorageError("--json", repr(file), "cannot be written to; name another file")


def _fail(error: MlpruneError, debug: bool, code: int) -> None:
    if debug:
        raise error
    click.echo(f"mlprune: {' '.join(str(error).split())}", err=True)
    sys.exit(code)


def _write_json(file: str, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if file == "-":
        click.echo(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def _spec(name: str, assignments: tuple[str, ...], settings: Mapping[str, Any]) -> SweepSpec:
    """The spec of that name, with the options that were given and then every --set."""
    from mlprune.spec.loading import as_assignments, load_spec

    return load_spec(name, [*as_assignments(settings), *assignments])


@_command
@click.argument("spec", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@click.option("--cluster", metavar="FILE", help="Run it on the cluster that `ray up FILE` made; from anywhere.")
@click.option("--attach", is_flag=True, help="Come back to the cluster's sweep: the one that runs, or the last.")
@_corpus
def sweep(
    spec: str | None,
    dry_run: bool,
    cluster: str | None,
    attach: bool,
    corpus: str | None,
    assignments: tuple[str, ...],
) -> Any:
    """Run the sweep SPEC: a file, or the name of one that comes with mlprune."""
    if cluster is not None:
        from mlprune.remote.ssh import check_cluster_file

        check_cluster_file(cluster)
    if attach:
        if cluster is None or spec or dry_run or corpus or assignments:
            raise SpecError("--attach", "given", "it goes with --cluster FILE, and besides that with --json alone")
        return _watch(cluster, None)
    spec = spec or "quickstart"
    checked = _spec(spec, assignments, {"calibration.corpus": corpus})
    if cluster is not None:
        from mlprune.remote.job_package import parcel
        from mlprune.spec.loading import as_assignments

        options = [*as_assignments({"calibration.corpus": corpus}), *assignments]
        return _watch(cluster, parcel(spec, checked, options, dry_run))
    from mlprune.report import sweep as report
    from mlprune.report.live import live_view
    from mlprune.report.page import description
    from mlprune.sweep.sweep import plan_sweep, run_sweep

    if dry_run:
        plan = plan_sweep(checked)
        report.show_plan(plan)
        return report.plan_values(plan)
    with live_view() as show:
        outcome = run_sweep(checked, show, description)
    report.show_outcome(outcome)
    return report.outcome_values(outcome)


def _watch(file: str, parcel: Parcel | None) -> Any:
    """Send a sweep to the cluster of that file, or find the one there; watch it, and return its result."""
    from mlprune.remote import jobs as remote

    context = click.get_current_context()
    cluster = context.with_resource(remote.connect(file))
    code, value = cluster.watch(cluster.latest() if parcel is None else cluster.start(parcel))
    if code != remote.INTERRUPTED:
        context.call_on_close(cluster.hold)  # after the result has been written
    if value is None:
        sys.exit(code)
    return value


@_command
@click.argument("model", required=False)
@click.option("--spec", help="Take what is not given here from this spec, not from quickstart.")
@click.option("--run", "run_id", metavar="ID", help="The trial of a sweep, by its MLflow run.")
@click.option("--calibration", metavar="KIND", help="mono:fr, translation:en-fr, code, mix:KIND=WEIGHT,...")
@click.option("--score", help="wanda, magnitude, ria, sparsegpt, contrastive:KIND/KIND, ... (docs/spec.md).")
@click.option("--sparsity", type=float, help="Share of weights to drop, in [0, 1).")
@click.option("--pattern", help="unstructured, or n:m as 2:4.")
@click.option("--allocation", help="uniform or owl.")
@click.option("--propagation", help="sequential or dense.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@_corpus
def prune(
    model: str | None,
    spec: str | None,
    run_id: str | None,
    corpus: str | None,
    assignments: tuple[str, ...],
    output: Path,
    **chosen: Any,
) -> Any:
    """Prune MODEL (a folder, a hub id, or demo) and write the checkpoint to a new folder.

    Without --propagation a layer's inputs come from the pruned layers before it (sequential).
    """
    from mlprune.commands import prune as winner

    settings = {"model.path": model, "calibration.corpus": corpus}
    if run_id is not None:
        if spec is not None:
            raise SpecError("--spec", repr(spec), "the run says which; leave it out, or --run")
        checked, variant = winner.choose_run(run_id, chosen, settings, assignments)
    else:
        checked, variant = winner.choose(spec or "quickstart", chosen, settings, assignments)
    manifest = winner.prune(checked, variant, output)
    click.echo(f"{variant.label}: {manifest['sparsity']['actual']:.2%} of the weights dropped", err=True)
    click.echo(f"written to {output}; score it with: mlprune evaluate {shlex.quote(str(output))}", err=True)
    return manifest


@_command
@click.argument("runs", nargs=2, metavar="RUN RUN")
def compare(runs: tuple[str, str], assignments: tuple[str, ...]) -> Any:
    """Compare two trials of sweeps, item by item: RUN RUN are their MLflow runs, the second against the first.

    For each task and language the difference, its 95% interval, and whether it is more than chance.
    """
    from mlprune.commands.compare import compare_runs
    from mlprune.report import comparison as report

    found = compare_runs(_spec("quickstart", assignments, {}), runs)
    report.show_comparison(found)
    return report.comparison_values(found)


@_command
@click.argument("model", required=False)
@click.option("--spec", default="quickstart", help="The sweep to plan; MODEL takes the place of its model.")
@click.option("--nodes", type=click.IntRange(1), help="Machines, all alike.")
@click.option("--gpus-per-node", type=click.IntRange(0), help="0: cores alone.")
@click.option("--gpu-memory", metavar="SIZE", help="Of one GPU, as 80GiB.")
@click.option("--host-memory", metavar="SIZE", help="Of one node, as 1TiB.")
@click.option("--host-to-device", metavar="SIZE", help="What a GPU is sent in a second, as 25GB.")
@click.option("--flops", type=float, help="Of one GPU (or node of cores) in a second, as 312e12.")
@_corpus
def plan(model: str | None, spec: str, corpus: str | None, assignments: tuple[str, ...], **machines: Any) -> Any:
    """Plan MODEL on machines: a folder, a hub id, demo, or a config.json alone. No weights are read.

    Without options for machines: those of the Ray cluster that runs, or else this one.
    """
    checked = _spec(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
    for name in ("gpu_memory", "host_memory", "host_to_device"):
        machines[name] = _size(name, machines[name])
    from mlprune.commands.plan import Asked, plan_scale
    from mlprune.report import plan as report

    planned = plan_scale(checked, Asked(**machines))
    report.show_scale(planned)
    return report.scale_values(planned)


def _size(name: str, text: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if text is None else int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SpecError("--" + name.replace("_", "-"), repr(text), "write a size, as 80GiB") from None


@_command
@click.argument("model")
@click.option("--spec", default="quickstart", help="Take what is not given here from this spec.")
@click.option("--languages", metavar="LIST", help="As en,fr; ISO 639 codes that the corpus has.")
@_corpus
def evaluate(
    model: str, spec: str, languages: str | None, corpus: str | None, assignments: tuple[str, ...]
) -> Any:
    """Score MODEL (a folder, a hub id, or demo): perplexity and bits per byte of held-out lines."""
    listed = [code.strip() for code in languages.split(",")] if languages is not None else None
    settings = {
        "model.path": model,
        "calibration.corpus": corpus,
        "evaluation.perplexity.languages": listed,
    }
    checked = _spec(spec, assignments, settings)
    from mlprune.commands.prune import evaluate_checkpoint
    from mlprune.report import sweep as report

    metrics = evaluate_checkpoint(checked)
    report.show_metrics(model, checked.evaluation.perplexity.languages, metrics)
    return {"model": model, "metrics": dict(metrics)}


@_command
@click.argument("model")
@click.option("--spec", default="quickstart", help="Take what is not given here from this spec.")
@click.option("--languages", required=True, metavar="LIST", help="As en,fr,hi; ISO 639 codes that the corpus has.")
@click.option("--pivot", default="en", show_default=True, help="What the others are translated from.")
@click.option("--layer", type=int, help="Of the picture of single channels; the middle one if not given.")
@click.option("--ratio", default=0.3, show_default=True, help="Share of channels that are top, and bottom.")
@click.option("--sparsity", default=0.5, show_default=True, help="Of the masks that are compared.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")
@_corpus
def analyze(
    model: str,
    spec: str,
    languages: str,
    corpus: str | None,
    assignments: tuple[str, ...],
    output: Path,
    **asked: Any,
) -> Any:
    """Look into MODEL (a folder, a hub id, or demo): which channels of its hidden states each calibration uses.

    Monolingual text of each language is set against translations from the pivot: how large channels are, whose
    top channels are whose bottom ones, and how much of Wanda's mask two calibrations share.
    """
    checked = _spec(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
    from mlprune.commands.analyze import Question
    from mlprune.commands.analyze import analyze as study
    from mlprune.report import analysis as report

    listed = tuple(dict.fromkeys(code.strip() for code in languages.split(",")))
    found = study(checked, Question(listed, **asked), output)
    report.show_findings(found)
    return report.findings_values(found)


@_command
@click.option("--cluster", metavar="FILE", help="Those on the head of the cluster that `ray up FILE` made.")
def status(cluster: str | None, assignments: tuple[str, ...]) -> Any:
    """Show the sweeps that run on this machine: their trials under way, shards, and time left."""
    if assignments:
        raise SpecError("--set", repr(assignments[0]), "status reads no spec; leave it out")
    if cluster is not None:
        from mlprune.remote import jobs as remote

        return remote.status(cluster)
    from mlprune.report import live as report
    from mlprune.sweep.status import running

    found = running()
    report.show_running(found)
    return report.running_values(found)
