"""The `search` section of the spec: the lists whose product is the grid of trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, InstanceOf, PlainSerializer, ValidationInfo, field_validator, model_validator

from mlprune.errors import SpecError
from mlprune.spec.calibrations import Calibration
from mlprune.spec.mixtures import MixtureSpec, mixture_list
from mlprune.spec.pretraining import PREFIX, Pretraining, pretraining_mixture
from mlprune.spec.section import Count, Section
from mlprune.spec.variants import Allocation, Pattern, Propagation, Repair, Scoring, two_sides

Sparsity = Annotated[float, Field(ge=0, lt=1)]
# text in a file, parsed objects in the spec, and text again wherever the spec is written
_AS_TEXT = PlainSerializer(str, return_type=str)
CalibrationItem = Annotated[InstanceOf[Calibration], _AS_TEXT]
ScoringItem = Annotated[InstanceOf[Scoring], _AS_TEXT]
PretrainingTable = Annotated[InstanceOf[Pretraining], PlainSerializer(lambda table: dict(table.shares))]
PatternItem = Annotated[InstanceOf[Pattern], _AS_TEXT]


class SearchSpec(Section):
    """The lists whose product is the grid; with `samples`, `searcher` picks that many trials of it."""

    pretraining: PretrainingTable | None = None  # before `calibration`, whose texts may refer to it
    calibration: tuple[CalibrationItem, ...] = ()
    mixture: tuple[MixtureSpec, ...] = ()
    score: Annotated[tuple[ScoringItem, ...], Field(min_length=1)]
    sparsity: Annotated[tuple[Sparsity, ...], Field(min_length=1)]
    pattern: Annotated[tuple[PatternItem, ...], Field(min_length=1)] = (Pattern(),)
    allocation: Annotated[tuple[Allocation, ...], Field(min_length=1)] = ("uniform",)
    propagation: Annotated[tuple[Propagation, ...], Field(min_length=1)] = ("sequential",)
    repair: Annotated[tuple[Repair, ...], Field(min_length=1)] = ("none",)
    seed: Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(min_length=1)] | None = None
    samples: Count | None = None
    searcher: Literal["random", "optuna"] = "random"
    objective: str = "mean"  # or worst, or the name of a metric that the evaluation yields
    screen: Count | None = None
    racing: bool = False

    @property
    def metric(self) -> str:
        """The metric by which trials are ranked; `mean` and `worst` are those of the loss over languages."""
        return f"loss.{self.objective}" if self.objective in ("mean", "worst") else self.objective

    @property
    def has_stages(self) -> bool:
        """Whether trials are evaluated in several stages, which may use the same masks."""
        return self.racing or self.screen is not None

    @field_validator("pretraining", mode="before")
    @classmethod
    def _shares(cls, values: object) -> object:
        return values if values is None or isinstance(values, Pretraining) else Pretraining.parse(values)

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibrations(cls, values: object, info: ValidationInfo) -> object:
        def parse(text: str, key: str) -> Calibration:
            if text.startswith(PREFIX):
                return pretraining_mixture(text, info.data.get("pretraining"), key)
            return Calibration.parse(text, key)

        return _parse_items(values, parse, "search.calibration")

    @field_validator("mixture", mode="before")
    @classmethod
    def _mixtures(cls, values: object) -> object:
        return mixture_list(values)

    @field_validator("score", mode="before")
    @classmethod
    def _scores(cls, values: object) -> object:
        if isinstance(values, list | tuple):
            values = [_score_text(value, f"search.score[{n}]") for n, value in enumerate(values)]
        return _parse_items(values, Scoring.parse, "search.score")

    @field_validator("pattern", mode="before")
    @classmethod
    def _patterns(cls, values: object) -> object:
        return _parse_items(values, Pattern.parse, "search.pattern")

    @model_validator(mode="after")
    def _optuna_needs_samples(self) -> SearchSpec:
        if self.searcher == "optuna" and self.samples is None:
            raise SpecError(
                "search.samples", None, "searcher optuna needs the number of trials; write e.g. samples: 20"
            )
        if self.searcher == "optuna" and len(self.seed or ()) > 1:
            remedy = "searcher optuna would choose among the seeds; write one"
            raise SpecError("search.seed", list(self.seed or ()), remedy)
        return self

    @model_validator(mode="after")
    def _few_evaluations_need_a_grid(self) -> SearchSpec:
        for name, value in (("screen", self.screen), ("racing", self.racing or None)):
            if value is not None and self.searcher == "optuna":
                remedy = "compares the trials of a grid with each other; write searcher: random"
                raise SpecError(f"search.{name}", value, remedy)
        if self.racing and not self.metric.startswith("loss."):
            remedy = "racing compares losses of held-out lines; write mean, worst or loss.fr, say"
            raise SpecError("search.objective", repr(self.objective), remedy)
        return self


def _parse_items(values: object, parse: Callable[[str, str], object], key: str) -> object:
    """Parse each text of a list, and let pydantic refuse whatever else there is."""
    if not isinstance(values, list | tuple):
        return values
    return [parse(value, f"{key}[{n}]") if isinstance(value, str) else value for n, value in enumerate(values)]


def _score_text(value: object, key: str) -> object:
    """Return `{contrastive: {keep: K, against: A}}` as `contrastive:K/A`, and anything else as it is."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    (name, sides), *_ = value.items()
    if not isinstance(sides, dict) or set(sides) != {"keep", "against"}:
        raise SpecError(key, repr(value), f"{name} needs both sides; write {two_sides(name)}")
    return f"{name}:{sides['keep']}/{sides['against']}"
