"""`mlprune analyze`: which hidden features several calibrations use, and how much of a mask two of them share.

The conditions are mono:x for each language, and translations between the pivot and each other language, in both
directions (the paper's figures: to English). Nothing is evaluated; the tables and pictures are made in `analysis`.
C: conditions. L: layers, and the embedding before them. H: channels of the hidden states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from mlprune.analysis import feature_pictures as pictures
from mlprune.analysis.features import (
    SharedCounts,
    channels_in,
    features_csv,
    masks_csv,
    mean_overlaps,
    overlap_csv,
    top_csv,
)
from mlprune.commands.checkpoint import check_output
from mlprune.console import step
from mlprune.errors import ModelError, SpecError, StorageError
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.calibrations import Calibration, Demonstration
from mlprune.spec.languages import language_name
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Pattern, Scoring, Variant
from mlprune.storage.files import check_folder, write_whole
from mlprune.sweep.grid import canonical_variant
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import run_on_model
from mlprune.sweep.trial import unseen_warning
from mlprune.tracking.mlflow_client import check_tracking
from mlprune.tracking.tracker import log_analysis

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalysisRequest:
    """The options of an analysis. Raises SpecError for an invalid one."""

    languages: tuple[str, ...]  # each once
    pivot: str = "en"
    layer: int | None = None  # whose single channels are drawn, 0: the embedding; None: the middle layer
    ratio: float = 0.3  # share of the channels that count as top, and as bottom
    sparsity: float = 0.5  # of the compared masks

    def __post_init__(self) -> None:
        for code in self.languages:
            language_name(code, "--languages")
        language_name(self.pivot, "--pivot")
        if len(self.languages) < 2:
            raise SpecError("--languages", repr(",".join(self.languages)), "name two or more, e.g. en,fr")
        if not 0 < self.ratio <= 0.5:
            raise SpecError("--ratio", self.ratio, "must be in (0, 0.5]: top and bottom are different channels")
        if not 0 < self.sparsity < 1:
            raise SpecError("--sparsity", self.sparsity, "must be in (0, 1)")

    @property
    def translated(self) -> tuple[str, ...]:
        """Return the languages with three conditions to compare: all but the pivot."""
        return tuple(code for code in self.languages if code != self.pivot)

    @property
    def forms(self) -> tuple[str, ...]:
        """Return the names of a language's three conditions, with x for its code: mono:x first."""
        return ("mono:x", f"translation:{self.pivot}-x", f"translation:x-{self.pivot}")

    def indices(self, code: str) -> tuple[int, ...]:
        """Return where the three conditions of a translated language are among all, in the order of `forms`."""
        conditions = self._demonstrations
        return tuple(map(conditions.index, (self._mono(code), self._from_pivot(code), self._to_pivot(code))))

    @property
    def conditions(self) -> tuple[str, ...]:
        """Return the conditions as text: mono:x of all languages, translation:pivot-x, translation:x-pivot."""
        return tuple(map(str, self._demonstrations))

    @property
    def _demonstrations(self) -> tuple[Demonstration, ...]:
        translations = (*map(self._from_pivot, self.translated), *map(self._to_pivot, self.translated))
        return (*map(self._mono, self.languages), *translations)

    def _mono(self, code: str) -> Demonstration:
        return Demonstration("mono", (code,))

    def _from_pivot(self, code: str) -> Demonstration:
        return Demonstration("translation", (self.pivot, code))

    def _to_pivot(self, code: str) -> Demonstration:
        return Demonstration("translation", (code, self.pivot))

    def variants(self, seed: int) -> list[Variant]:
        """Return one variant per condition, in their order."""
        return [
            canonical_variant(
                Calibration(((part, Fraction(1)),)), Scoring("wanda"), self.sparsity, Pattern(), "dense", seed=seed
            )
            for part in self._demonstrations
        ]


@dataclass(frozen=True, eq=False)
class AnalysisResult:
    """The outcome of an analysis, and where it is written."""

    spec: SweepSpec
    request: AnalysisRequest
    layer: int  # whose single channels are drawn
    magnitude_CLH: Tensor  # float64
    shared: SharedCounts
    output: Path
    files: tuple[str, ...]  # names within `output`
    run: str  # MLflow run id


def analyze(spec: SweepSpec, request: AnalysisRequest, output: Path) -> AnalysisResult:
    """Pass every condition through the spec's model, compare them, and write tables and pictures to `output`.

    Raises UserError for a mistake in the request, the spec or the folder, before weights are loaded.
    """
    _check_output(output)
    check_tracking(spec.tracking_uri)
    prepared = prepare(spec, request.variants(spec.calibration.seed), evaluate=False)
    layer = _layer(request, prepared)

    def measure(pipeline: Pipeline) -> tuple[Tensor, SharedCounts]:
        return _magnitudes(prepared, pipeline, request), _shared(prepared, pipeline, request)

    magnitude_CLH, shared = run_on_model(prepared, "analyzing", measure)
    model = Path(spec.model.path).absolute().name
    with step(f"writing {output}"):
        files = _files(request, layer, magnitude_CLH, shared, model)
        for name, content in files.items():
            write_whole(output / name, content)
        run = log_analysis(
            spec.tracking_uri,
            spec.tracking.experiment or "analysis",
            spec.artifacts_folder,
            f"{model} {','.join(request.languages)}",
            _params(prepared, request, layer),
            [output / name for name in files],
        )
    return AnalysisResult(spec, request, layer, magnitude_CLH, shared, output, tuple(files), run)


def _check_output(output: Path) -> None:
    if not os.path.lexists(output):
        check_output(output, 0)
    check_folder(output, "--output", output)
    if output.is_dir() and any(output.iterdir()):
        raise StorageError("--output", repr(str(output)), "is not empty; use a new folder")


def _layer(request: AnalysisRequest, prepared: Prepared) -> int:
    """Return the layer whose single channels are drawn. Raises SpecError for what the model's sizes rule out."""
    count, width = len(prepared.model_size.layers), prepared.model_size.hidden
    layer = count // 2 if request.layer is None else request.layer
    if not 0 <= layer <= count:
        raise SpecError("--layer", layer, f"the model has {count} layers; write 0 (the embedding) to {count}")
    if not channels_in(width, request.ratio):
        raise SpecError("--ratio", request.ratio, f"selects none of the {width} channels; use a larger share")
    return layer


def _magnitudes(prepared: Prepared, pipeline: Pipeline, request: AnalysisRequest) -> Tensor:
    """Return each channel's L2 norm over the tokens of a prompt, averaged over the prompts: float64 [C, L, H].

    The pass gathers moments too, even if the store has them: the masks are made from these.
    """
    sets = [prepared.set_of(condition) for condition in request.conditions]
    with step(f"calibrating on {', '.join(request.conditions)}", "batches") as progress:
        sums = pipeline.gather_features(sets, prepared.model_size.hidden, progress)
    magnitude_CLH = torch.stack(
        [sum_LH / len(calibration.prompts) for sum_LH, calibration in zip(sums, sets, strict=True)]
    )
    if not magnitude_CLH.isfinite().all():
        remedy = "the hidden states are not finite; load the model in float32, or check its weights"
        raise ModelError("model.dtype", prepared.spec.model.dtype, remedy)
    return magnitude_CLH


def _shared(prepared: Prepared, pipeline: Pipeline, request: AnalysisRequest) -> SharedCounts:
    variants = request.variants(prepared.spec.calibration.seed)
    with step(f"masks of {len(variants)} calibrations"):
        layers = pipeline.shared_drops([prepared.recipe(variant) for variant in variants])
    unseen = tuple(name for layer in layers for name in layer.unseen)
    if unseen:
        logger.warning(unseen_warning(unseen))
    return [layer.counts for layer in layers]


def _files(
    request: AnalysisRequest, layer: int, magnitude_CLH: Tensor, shared: SharedCounts, model: str
) -> Mapping[str, bytes]:
    conditions, ratio, sparsity = request.conditions, request.ratio, request.sparsity
    places = {code: request.indices(code) for code in request.translated}
    compared = {
        code: {form: magnitude_CLH[index, layer] for form, index in zip(request.forms, indices, strict=True)}
        for code, indices in places.items()
    }
    bottom_CC, top_CC = (mean_overlaps(magnitude_CLH, ratio, end) for end in ("bottom", "top"))
    return {
        "features.csv": features_csv(conditions, magnitude_CLH),
        "overlap.csv": overlap_csv(conditions, magnitude_CLH, ratio),
        "masks.csv": masks_csv(conditions, shared),
        "top.csv": top_csv(compared, layer),
        "top.png": pictures.draw_top(compared, layer, model),
        "overlap.png": pictures.draw_overlap(conditions, bottom_CC, top_CC, ratio, model),
        "masks.png": pictures.draw_masks(places, request.forms, shared, sparsity, model),
        "masks_pairs.png": pictures.draw_mask_pairs(conditions, shared, sparsity, model),
    }


def _params(prepared: Prepared, request: AnalysisRequest, layer: int) -> dict[str, object]:
    return {
        **prepared.params(),
        "languages": ",".join(request.languages),
        "pivot": request.pivot,
        "layer": layer,
        "ratio": request.ratio,
        "sparsity": request.sparsity,
    }
