"""What calibration texts do in a model: the features that they use, and how much of a mask two of them share.

The conditions are mono:x for each language, and translation:pivot-x for each but the pivot. Nothing is evaluated.
C: conditions. L: layers. H: hidden width, its channels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlprune.analysis import feature_pictures as pictures
from mlprune.analysis.features import (
    SharedCounts,
    channels_in,
    features_csv,
    masks_csv,
    overlap_csv,
    overlaps,
    top_csv,
)
from mlprune.commands.checkpoint import check_output
from mlprune.console import step, warn
from mlprune.errors import ModelError, SpecError, StorageError
from mlprune.shards.pipeline import Pipeline
from mlprune.spec.languages import language_name
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Demonstration, Variant
from mlprune.storage.files import check_folder, write_whole
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.prepare import Prepared, prepare
from mlprune.sweep.session import run_on_model
from mlprune.sweep.trial import unseen_note
from mlprune.tracking.mlflow_client import check_tracking
from mlprune.tracking.tracker import log_analysis


@dataclass(frozen=True)
class Question:
    """What is asked. Raises SpecError when it cannot be."""

    languages: tuple[str, ...]  # each once
    pivot: str = "en"
    layer: int | None = None  # of the picture of single channels; None: the middle one
    ratio: float = 0.3  # of the channels that are top, and that are bottom
    sparsity: float = 0.5  # of the masks

    def __post_init__(self) -> None:
        for code in self.languages:
            language_name(code, "--languages")
        language_name(self.pivot, "--pivot")
        if len(self.languages) < 2:
            raise SpecError("--languages", repr(",".join(self.languages)), "name two or more, as en,fr")
        if not 0 < self.ratio <= 0.5:
            raise SpecError("--ratio", self.ratio, "must be in (0, 0.5]: top and bottom are different channels")
        if not 0 < self.sparsity < 1:
            raise SpecError("--sparsity", self.sparsity, "must be in (0, 1)")

    @property
    def translated(self) -> tuple[str, ...]:
        """Languages with two conditions to compare."""
        return tuple(code for code in self.languages if code != self.pivot)

    def _translation(self, code: str) -> str:
        return str(Demonstration("translation", (self.pivot, code)))

    def places(self, code: str) -> tuple[int, int]:
        """Of one of `translated`, the places of mono:x and translation:pivot-x among the conditions."""
        return self.conditions.index(_mono(code)), self.conditions.index(self._translation(code))

    @property
    def conditions(self) -> tuple[str, ...]:
        return (*map(_mono, self.languages), *(self._translation(code) for code in self.translated))

    @property
    def variants(self) -> list[Variant]:
        """One a condition, in their order."""
        return [
            parse_variant(condition, "wanda", self.sparsity, "unstructured", "dense")
            for condition in self.conditions
        ]


def _mono(code: str) -> str:
    return str(Demonstration("mono", (code,)))


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found, and where it is written."""

    spec: SweepSpec
    question: Question
    layer: int  # of the picture of single channels
    magnitude_CLH: Tensor  # float64
    shared: SharedCounts
    output: Path
    files: tuple[str, ...]  # names within `output`
    run: str  # MLflow's


def analyze(spec: SweepSpec, question: Question, output: Path) -> Findings:
    """Pass every condition through the spec's model, compare them, and write tables and pictures to `output`.

    Raises UserError for what is wrong with the question, the spec or the folder, before weights are loaded.
    """
    _check_output(output)
    check_tracking(spec.tracking_uri)
    prepared = prepare(spec, question.variants, evaluate=False)
    layer = _layer(question, prepared)

    def look(pipeline: Pipeline) -> tuple[Tensor, SharedCounts]:
        return _magnitudes(prepared, pipeline, question), _shared(prepared, pipeline, question)

    magnitude_CLH, shared = run_on_model(prepared, "analyzing", look)
    model = Path(spec.model.path).absolute().name
    with step(f"writing {output}"):
        files = _files(question, layer, magnitude_CLH, shared, model)
        for name, content in files.items():
            write_whole(output / name, content)
        run = log_analysis(
            spec.tracking_uri,
            spec.tracking.experiment or "analysis",
            spec.local_folder / "mlartifacts",
            f"{model} {','.join(question.languages)}",
            _params(prepared, question, layer),
            [output / name for name in files],
        )
    return Findings(spec, question, layer, magnitude_CLH, shared, output, tuple(files), run)


def _check_output(output: Path) -> None:
    if not os.path.lexists(output):
        check_output(output, 0)
    check_folder(output, "--output", output)
    if output.is_dir() and any(output.iterdir()):
        raise StorageError("--output", repr(str(output)), "is not empty; name a new folder")


def _layer(question: Question, prepared: Prepared) -> int:
    """The layer of the picture of single channels. Raises SpecError for what the model's sizes rule out."""
    count, width = len(prepared.model_size.layers), prepared.model_size.hidden
    layer = count // 2 if question.layer is None else question.layer
    if not 0 <= layer < count:
        raise SpecError("--layer", layer, f"the model has {count} layers; write 0 to {count - 1}")
    if not channels_in(width, question.ratio):
        raise SpecError("--ratio", question.ratio, f"is none of the model's {width} channels; take more")
    return layer


def _magnitudes(prepared: Prepared, pipeline: Pipeline, question: Question) -> Tensor:
    """Of each channel the L2 norm over a prompt's tokens, mean over the prompts: float64 [C, L, H].

    The pass gathers moments too, though the store may have them: masks are made from these.
    """
    sets = [prepared.sets[condition] for condition in question.conditions]
    with step(f"calibrating on {', '.join(question.conditions)}", "batches") as progress:
        sums = pipeline.gather_features(sets, prepared.model_size.hidden, progress)
    magnitude_CLH = torch.stack([sum_LH / len(made.prompts) for sum_LH, made in zip(sums, sets, strict=True)])
    if not magnitude_CLH.isfinite().all():
        remedy = "the hidden states are not finite; load the model in float32, or check its weights"
        raise ModelError("model.dtype", prepared.spec.model.dtype, remedy)
    return magnitude_CLH


def _shared(prepared: Prepared, pipeline: Pipeline, question: Question) -> SharedCounts:
    with step(f"masks of {len(question.variants)} calibrations"):
        layers = pipeline.shared_drops([prepared.recipe(variant) for variant in question.variants])
    unseen = tuple(name for layer in layers for name in layer.unseen)
    if unseen:
        warn(unseen_note(unseen))
    return [layer.counts for layer in layers]


def _files(
    question: Question, layer: int, magnitude_CLH: Tensor, shared: SharedCounts, model: str
) -> Mapping[str, bytes]:
    conditions, ratio, sparsity, pivot = question.conditions, question.ratio, question.sparsity, question.pivot
    places = {code: question.places(code) for code in question.translated}
    pairs = {code: (magnitude_CLH[a, layer], magnitude_CLH[b, layer]) for code, (a, b) in places.items()}
    bottom_CC, top_CC = (overlaps(magnitude_CLH, ratio, end).mean(2) for end in ("bottom", "top"))
    return {
        "features.csv": features_csv(conditions, magnitude_CLH),
        "overlap.csv": overlap_csv(conditions, magnitude_CLH, ratio),
        "masks.csv": masks_csv(conditions, shared),
        "top.csv": top_csv(pairs, layer),
        "top.png": pictures.draw_top(pairs, layer, pivot, model),
        "overlap.png": pictures.draw_overlap(conditions, bottom_CC, top_CC, ratio, model),
        "masks.png": pictures.draw_masks(places, shared, sparsity, pivot, model),
        "masks_pairs.png": pictures.draw_mask_pairs(conditions, shared, sparsity, model),
    }


def _params(prepared: Prepared, question: Question, layer: int) -> dict[str, object]:
    asked = prepared.spec.calibration
    return {
        "model": prepared.spec.model.path,
        "model.fingerprint": prepared.fingerprint,
        "model.dtype": str(prepared.model_size.dtype).removeprefix("torch."),
        "corpus": asked.corpus,
        "samples": asked.samples,
        "shots": asked.shots,
        "max_tokens": asked.max_tokens,
        "seed": asked.seed,
        "languages": ",".join(question.languages),
        "pivot": question.pivot,
        "layer": layer,
        "ratio": question.ratio,
        "sparsity": question.sparsity,
    }
