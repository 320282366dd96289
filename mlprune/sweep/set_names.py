"""The names of the calibration sets that trials read: the demonstration, as text, and the seed of each.

The sets themselves are built in `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import OF_LANGUAGES, Variant
from mlprune.sweep.grid import needs_dense_moments

SetName = tuple[str, int]  # of a calibration set: the demonstration, e.g. mono:fr, and the seed


def set_names(variants: Iterable[Variant]) -> set[SetName]:
    """Return the calibration sets that the variants read."""
    return {(str(part), variant.seed) for variant in variants for part in variant.demonstrations}


def forecast_set_names(spec: SweepSpec) -> set[SetName]:
    """Return the monolingual text of each language of the evaluation, on which damage is forecast."""
    return {(f"mono:{code}", spec.calibration.seed) for code in spec.evaluation.perplexity.languages}


def dense_set_names(variants: Iterable[Variant], spec: SweepSpec, forecasts: bool) -> set[SetName]:
    """Return the sets that pass the dense model: those that masks are made from, and those of forecasts."""
    variants = list(variants)
    names = set_names(filter(needs_dense_moments, variants))
    return names | forecast_set_names(spec) if reads_languages(variants, forecasts) else names


def reads_languages(variants: Sequence[Variant], forecasts: bool) -> bool:
    """Return whether monolingual text of every evaluated language is needed."""
    return any(forecasts or variant.allocation in OF_LANGUAGES for variant in variants)
