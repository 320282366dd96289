"""The schema of a sweep's spec: frozen pydantic models that refuse unknown keys.

Every key has a default, except those of `search`. Reading a file into it is in `loading.py`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import yaml
from pydantic import ByteSize, Field, field_validator, model_validator

from mlprune.errors import SpecError
from mlprune.spec.claims import ClaimSpec, check_claims
from mlprune.spec.evaluation import EvaluationSpec
from mlprune.spec.limits import absolute_path
from mlprune.spec.mixtures import MinimaxMixture
from mlprune.spec.search import SearchSpec
from mlprune.spec.section import Count, Section
from mlprune.spec.urls import scheme_only, storage_has_secret

DEFAULT_STORAGE = "mlprune-store"


class ModelSpec(Section):
    """The model, and what may be done to read it."""

    path: str = "demo"  # a folder, a Hugging Face model id, or demo
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PipelineSpec(Section):
    """How the model is cut into shards and held in memory."""

    shards: Count | Literal["auto"] = "auto"
    residency: Literal["auto", "resident", "zero"] = "auto"
    offload: Literal["cpu", "nvme"] | None = None
    offload_folder: str | None = None
    ranks_per_shard: Annotated[Count, Field(le=1024)] = 1
    replicas: Annotated[Count, Field(le=1024)] = 1
    wait_minutes: Annotated[float, Field(ge=0, le=525_600)] | None = None  # a year at most
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
        return None if value is None else absolute_path(value, "pipeline.offload_folder")

    @model_validator(mode="after")
    def _resident_is_not_offloaded(self) -> PipelineSpec:
        if self.residency == "resident" and self.offload is not None:
            raise SpecError("pipeline.offload", self.offload, "offloading needs pipeline.residency=zero")
        if self.residency == "resident" and self.ranks_per_shard > 1:
            remedy = "several ranks need pipeline.residency=zero; else write 1"
            raise SpecError("pipeline.ranks_per_shard", self.ranks_per_shard, remedy)
        return self


class CalibrationSpec(Section):
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


class TrackingSpec(Section):
    """Where MLflow is.

    `uri` None: MLFLOW_TRACKING_URI, else an sqlite file in the storage. `experiment` None: the sweep's name.
    """

    uri: Annotated[str, Field(min_length=1)] | None = None
    experiment: Annotated[str, Field(min_length=1)] | None = None


class SweepSpec(Section):
    """A whole sweep."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "sweep"
    model: ModelSpec = ModelSpec()
    pipeline: PipelineSpec = PipelineSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    search: SearchSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    claims: tuple[ClaimSpec, ...] = ()
    storage: Annotated[str, Field(validate_default=True)] = DEFAULT_STORAGE
    tracking: TrackingSpec = TrackingSpec()

    @field_validator("claims")
    @classmethod
    def _claims(cls, values: tuple[ClaimSpec, ...]) -> tuple[ClaimSpec, ...]:
        check_claims(values)
        return values

    @model_validator(mode="after")
    def _minimax_has_losses(self) -> SweepSpec:
        for mixture in self.search.mixture:
            if isinstance(mixture, MinimaxMixture):
                mixture.languages(self.evaluation.perplexity.languages)
        return self

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Make a folder absolute, since trials run in directories of their own; keep other addresses."""
        if storage_has_secret(value):
            remedy = "no secrets in specs; use the provider's own credentials"
            raise SpecError("storage", scheme_only(value), remedy)
        return value if "://" in value else absolute_path(value, "storage")

    @model_validator(mode="after")
    def _agreement_needs_two_languages(self) -> SweepSpec:
        for allocation in self.search.allocation:
            if allocation in ("agreement", "disagreement") and len(self.evaluation.perplexity.languages) < 2:
                remedy = "it compares languages; write two or more in evaluation.perplexity.languages"
                raise SpecError("search.allocation", repr(allocation), remedy)
        return self

    def yaml(self) -> str:
        """Return the whole spec as YAML, with its defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def key(self) -> str:
        """A content hash of what the sweep computes. Where it runs and is stored has no influence.

        Defaults are left out, so that a key which a later version adds does not change the hash of older specs.
        """
        content = self.model_dump_json(exclude={"pipeline", "storage", "tracking"}, exclude_defaults=True)
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

    @property
    def artifacts_folder(self) -> Path:
        """The folder for files that are logged to an MLflow database: beside the one in the storage."""
        return self.local_folder / "mlartifacts"

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
    def _other_tracking_uri(self) -> str | None:
        return self.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None

    @property
    def tracks_in_storage(self) -> bool:
        """Whether the MLflow database is in the storage, and moves with it."""
        return self._other_tracking_uri is None

    @property
    def tracking_uri(self) -> str:
        """The spec's URI, else the environment's, else an sqlite file in the storage, which must be a folder."""
        if uri := self._other_tracking_uri:
            return uri
        if "://" in self.storage:
            remedy = f"sqlite cannot be at {self.storage}; name a server or a database"
            raise SpecError("tracking.uri", None, remedy)
        return f"sqlite:///{self.storage_folder}/mlflow.db"


def _absolute_if_exists(path: str) -> str:
    return str(Path(path).absolute()) if path not in ("demo", "sample", "stdlib") and Path(path).exists() else path
