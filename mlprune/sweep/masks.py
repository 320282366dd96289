"""Gathers the moments that variants read, and has the workers make masks from them.

The arithmetic is in `pruning` and `shards`; here is only what a variant needs and in which order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from mlprune.console import step
from mlprune.shards.pipeline import MaskOutcome, Pipeline, Progress
from mlprune.spec.variants import Variant
from mlprune.sweep.allocations import allocate
from mlprune.sweep.prepare import Prepared

logger = logging.getLogger(__name__)


def gather_moments(prepared: Prepared, pipeline: Pipeline, variants: Iterable[Variant]) -> None:
    """Load the dense moments that the variants need from the store; gather missing ones, all in one pass."""
    missing, texts = {}, []
    for (text, _), calibration in prepared.dense_sets(variants).items():
        complete, corrupt = pipeline.restore(calibration.key)
        for file in corrupt:
            logger.warning("%s is corrupt; its moments are gathered again", file)
        if not complete:
            missing[calibration.key] = calibration  # truncated to few tokens, two texts may be the same
            texts.append(text)
    if missing:
        with step(f"calibrating on {', '.join(dict.fromkeys(texts))}", "batches") as progress:
            pipeline.gather(list(missing.values()), progress)


def make_masks(
    prepared: Prepared,
    pipeline: Pipeline,
    variant: Variant,
    progress: Progress | None = None,
    forecast: bool = False,
) -> MaskOutcome:
    """Make the variant's masks; they stay in the workers. Dense moments must have been gathered before.

    `forecast`: also forecast the damage to each language of the evaluation, in `MaskOutcome.forecast`.
    """
    recipe = prepared.recipe(variant)
    if forecast:
        recipe = replace(recipe, forecasts=prepared.forecasts)
    if variant.allocation != "uniform":
        recipe = replace(recipe, dropped=allocate(prepared, pipeline, recipe))
    if variant.propagation == "sequential":
        return pipeline.prune_sequentially(recipe, prepared.sets_of(variant), progress)
    return pipeline.prune(recipe)
