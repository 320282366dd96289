"""The schema of a sweep's spec: frozen pydantic models that refuse unknown keys.

Every key has a default, except those of `search`. Reading a file into it is in `loading.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    field_validator,
    model_validator,
)

from mlprune.errors import SpecError
from mlprune.spec.languages import language_name
from mlprune.spec.urls import scheme_only, storage_has_secret
from mlprune.spec.variants import Allocation, Calibration, Pattern, Propagation, Scoring, two_sides

DEFAULT_STORAGE = "mlprune-store"
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, strict=True)]
# text in a file, parsed objects in the spec, and text again wherever the spec is written
_AS_TEXT = PlainSerializer(str, return_type=str)
CalibrationItem = Annotated[InstanceOf[Calibration], _AS_TEXT]
ScoringItem = Annotated[InstanceOf[Scoring], _AS_TEXT]
PatternItem = Annotated[InstanceOf[Pattern], _AS_TEXT]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Section):
    """The model, and what may be done to read it."""

    path: str = "demo"  # a folder, a Hugging Face model id, or demo
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PipelineSpec(_Section):
    """How the model is cut into shards and held in memory."""

    shards: Count | Literal["auto"] = "auto"
    residency: Literal["auto", "resident", "zero"] = "auto"
    offload: Literal["cpu", "nvme"] | None = None
    offload_folder: str | None = None
    ranks_per_shard: Count = 1
    replicas: Count = 1
    wait_minutes: Annotated[float, Field(ge=0)] | None = None
    worker_memory: Annotated[ByteSize, Field(gt=0)] | None = None

    @field_validator("worker_memory", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        if isinstance(value, bool):
            raise SpecError("pipeline.worker_memory", repr(value), "must be a size, e.g. 16GiB")
        return value

    @field_validator("offload_folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _resident_is_not_offloaded(self) -> PipelineSpec:
        if self.residency == "resident" and self.offload is not None:
            raise SpecError("pipeline.offload", self.offload, "offloading needs pipeline.residency=zero")
        if self.residency == "resident" and self.ranks_per_shard > 1:
            remedy = "several ranks need pipeline.residency=zero; else write 1"
            raise SpecError("pipeline.ranks_per_shard", self.ranks_per_shard, remedy)
        return self


class CalibrationSpec(_Section):
    """Settings shared by all calibration sets of the sweep."""

    corpus: str = "sample"
    samples: Count = 32
    shots: Count = 4
    max_tokens: Annotated[int, Field(ge=2, strict=True)] = 256
    seed: Annotated[int, Field(strict=True)] = 0
    template: str = "{language}: {text}"
    separator: str | None = None
    count_padding: bool = False
    code: str = "stdlib"


class SearchSpec(_Section):
    """The lists whose product is the grid; with `samples`, `searcher` picks that many trials of it."""

    calibration: tuple[CalibrationItem, ...] = ()
    score: Annotated[tuple[ScoringItem, ...], Field(min_length=1)]
    sparsity: Annotated[tuple[Sparsity, ...], Field(min_length=1)]
    pattern: Annotated[tuple[PatternItem, ...], Field(min_length=1)] = (Pattern(),)
    allocation: Annotated[tuple[Allocation, ...], Field(min_length=1)] = ("uniform",)
    propagation: Annotated[tuple[Propagation, ...], Field(min_length=1)] = ("sequential",)
    samples: Count | None = None
    searcher: Literal["random", "optuna"] = "random"
    objective: Literal["mean", "worst"] = "mean"

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibrations(cls, values: object) -> object:
        return _parse_items(values, Calibration.parse, "search.calibration")

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


class PerplexitySpec(_Section):
    """The likelihood of held-out lines."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)] = ("en", "fr", "de")
    lines: Count = 64

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_languages(values, "evaluation.perplexity.languages")


def _checked_languages(values: tuple[str, ...], key: str) -> tuple[str, ...]:
    for n, code in enumerate(values):
        language_name(code, f"{key}[{n}]")
    return tuple(dict.fromkeys(values))


class XnliSpec(_Section):
    """XNLI by filled templates; the labels stand for entailment, neutral, contradiction."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    data: str = "facebook/xnli"
    items: Count | None = None
    template: str = "{premise} , right? {label} , {hypothesis}"
    labels: Annotated[tuple[str, ...], Field(min_length=3, max_length=3)] = ("Yes", "Also", "No")

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_languages(values, "evaluation.xnli.languages")


class ReviewsSpec(_Section):
    """Sentiment of reviews by filled templates; the labels stand for negative, positive."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    data: str
    items: Count | None = None
    template: str = "{review} It is {label}"
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)] = ("negative", "positive")

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_languages(values, "evaluation.reviews.languages")


class TranslationSpec(_Section):
    """Few-shot greedy translation of held-out lines of the calibration corpus."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)]
    shots: Count = 4
    lines: Count = 32
    max_new_tokens: Count = 96

    @field_validator("pairs")
    @classmethod
    def _pairs(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for n, pair in enumerate(values):
            key, codes = f"evaluation.translation.pairs[{n}]", pair.split("-")
            if len(set(codes)) != 2 or len(codes) != 2:
                raise SpecError(key, repr(pair), "write two languages, source first, e.g. fr-en")
            for code in codes:
                language_name(code, key)
        return tuple(dict.fromkeys(values))


class EvaluationSpec(_Section):
    """The tasks by which every trial is evaluated."""

    perplexity: PerplexitySpec = PerplexitySpec()
    xnli: XnliSpec | None = None
    reviews: ReviewsSpec | None = None
    translation: TranslationSpec | None = None
    tasks: tuple[str, ...] = ()  # names of lm-evaluation-harness
    task_path: str | None = None
    task_items: Count | None = None

    @field_validator("tasks")
    @classmethod
    def _unique(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("task_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())


class TrackingSpec(_Section):
    """Where MLflow is.

    `uri` None: MLFLOW_TRACKING_URI, else an sqlite file in the storage. `experiment` None: the sweep's name.
    """

    uri: str | None = None
    experiment: str | None = None


class SweepSpec(_Section):
    """A whole sweep."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "sweep"
    model: ModelSpec = ModelSpec()
    pipeline: PipelineSpec = PipelineSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    search: SearchSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    storage: Annotated[str, Field(validate_default=True)] = DEFAULT_STORAGE
    tracking: TrackingSpec = TrackingSpec()

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Make a folder absolute, since trials run in directories of their own; keep other addresses."""
        if storage_has_secret(value):
            remedy = "no secrets in specs; use the provider's own credentials"
            raise SpecError("storage", scheme_only(value), remedy)
        return value if "://" in value else str(Path(value).expanduser().absolute())

    def yaml(self) -> str:
        """Return the whole spec as YAML, with its defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def key(self) -> str:
        """A content hash of what the sweep computes. Where it runs and is stored has no influence."""
        content = self.model_dump_json(exclude={"pipeline", "storage", "tracking"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def storage_folder(self) -> Path:
        """The storage, which must be a folder."""
        assert "://" not in self.storage
        return Path(self.storage)

    @property
    def local_folder(self) -> Path:
        """The folder for what must be on this machine's disk: the storage, or a cache folder for a remote one."""
        if "://" not in self.storage:
            return self.storage_folder
        return platformdirs.user_cache_path("mlprune") / hashlib.sha256(self.storage.encode()).hexdigest()[:16]

    def anchored(self) -> SweepSpec:
        """Return the same spec with paths that exist made absolute, so that it can be read from any folder."""
        calibration = {
            "corpus": _absolute_if_exists(self.calibration.corpus),
            "code": _absolute_if_exists(self.calibration.code),
        }
        tasks = {
            name: task.model_copy(update={"data": _absolute_if_exists(task.data)})
            for name, task in (("xnli", self.evaluation.xnli), ("reviews", self.evaluation.reviews))
            if task is not None
        }
        changes = {
            "model": self.model.model_copy(update={"path": _absolute_if_exists(self.model.path)}),
            "calibration": self.calibration.model_copy(update=calibration),
            "evaluation": self.evaluation.model_copy(update=tasks),
        }
        return self.model_copy(update=changes)

    @property
    def offload_folder(self) -> Path:
        """The folder for weights that are offloaded to disk."""
        return Path(self.pipeline.offload_folder or self.local_folder / "offload")

    @property
    def tracking_uri(self) -> str:
        """The spec's URI, else the environment's, else an sqlite file in the storage, which must be a folder."""
        if uri := self.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
            return uri
        if "://" in self.storage:
            remedy = f"sqlite cannot be at {self.storage}; name a server or a database"
            raise SpecError("tracking.uri", None, remedy)
        return f"sqlite:///{self.storage_folder}/mlflow.db"


def _absolute_if_exists(path: str) -> str:
    return str(Path(path).absolute()) if path not in ("demo", "sample", "stdlib") and Path(path).exists() else path
