"""The commands `compare` and `analyze`: what sweeps and calibrations differ in."""

from __future__ import annotations

from pathlib import Path

import click

from mlprune.cli.command import Values, base_spec, command, corpus_option, new_folder, spec_of


@command
@click.argument("runs", nargs=2, metavar="RUN RUN")
def compare(runs: tuple[str, str], assignments: tuple[str, ...]) -> Values:
    """Compare two trials of sweeps, item by item.

    Each RUN is an MLflow run id; the second is compared with the first. For each task and language: the
    difference, its 95% confidence interval, and whether it is significant.
    """
    from mlprune.commands.compare import compare_runs
    from mlprune.report import comparison as report

    comparison = compare_runs(spec_of("quickstart", assignments, {}), runs)
    report.show_comparison(comparison)
    return report.comparison_values(comparison)


@command
@click.argument("model")
@base_spec
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
@new_folder
@corpus_option
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
    checked = spec_of(spec, assignments, {"model.path": model, "calibration.corpus": corpus})
    from mlprune.commands.analyze import AnalysisRequest
    from mlprune.commands.analyze import analyze as study
    from mlprune.report import analysis as report

    codes = tuple(dict.fromkeys(code.strip() for code in languages.split(",")))
    result = study(checked, AnalysisRequest(codes, pivot, layer, ratio, sparsity), output)
    report.show_analysis(result)
    return report.analysis_values(result)
