"""The spec of a sweep: one YAML file, frozen, every key with a default but `search`, unknown keys refused."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlprune.errors import SpecError
from mlprune.languages import name_of
from mlprune.variants import Calibration, Pattern, Scoring, two_sides

DEFAULT_STORAGE = "mlprune-store"
Sparsity = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Loader(yaml.SafeLoader):
    """Plain scalars as in YAML 1.2, and no key twice.

    In YAML 1.1 the code of Norwegian, `no`, is false; `2:4` is 124, in base 60; and dates are no text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _kind, _form, _first in (
    ("null", r"null|Null|NULL|~|", "nN~\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"), list(_first))


def read_yaml(text: str) -> Any:
    """Plain values of YAML text; no tag of it runs code. Raises yaml.YAMLError for whatever is wrong with it."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error  # a value that its tag does not fit


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Section):
    """Which model, and what is allowed in reading it."""

    path: str = "demo"  # a folder, a hub id, or demo
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PipelineSpec(_Section):
    """How the model is held."""

    shards: Count | Literal["auto"] = "auto"
    residency: Literal["auto", "resident", "zero"] = "auto"
    offload: Literal["cpu", "nvme"] | None = None
    offload_folder: str | None = None
    ranks_per_shard: Count = 1
    worker_memory: Annotated[ByteSize, Field(gt=0)] | None = None

    @field_validator("worker_memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise SpecError("pipeline.worker_memory", repr(value), "must be a size, as 16GiB")
        return value

    @field_validator("offload_folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _resident_moves_nothing(self) -> PipelineSpec:
        if self.residency == "resident" and self.offload is not None:
            raise SpecError("pipeline.offload", self.offload, "weights that move are residency zero")
        if self.residency == "resident" and self.ranks_per_shard > 1:
            remedy = "ranks share weights that move: residency zero, or 1"
            raise SpecError("pipeline.ranks_per_shard", self.ranks_per_shard, remedy)
        return self


class CalibrationSpec(_Section):
    """What every calibration set of the sweep has in common."""

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
    """The lists whose product is the grid; with `samples`, that many of it, by `searcher`."""

    calibration: tuple[str, ...] = ()
    score: Annotated[tuple[str, ...], Field(min_length=1)]
    sparsity: Annotated[tuple[Sparsity, ...], Field(min_length=1)]
    pattern: Annotated[tuple[str, ...], Field(min_length=1)] = ("unstructured",)
    allocation: Annotated[tuple[Literal["uniform", "owl"], ...], Field(min_length=1)] = ("uniform",)
    propagation: Annotated[tuple[Literal["sequential", "dense"], ...], Field(min_length=1)] = ("sequential",)
    samples: Count | None = None
    searcher: Literal["random", "optuna"] = "random"
    objective: Literal["mean", "worst"] = "mean"

    @field_validator("calibration")
    @classmethod
    def _calibrations(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Calibration.parse(text, f"search.calibration[{n}]")) for n, text in enumerate(values))

    @field_validator("score", mode="before")
    @classmethod
    def _scores(cls, values: Any) -> Any:
        if not isinstance(values, list | tuple):
            return values
        return [_score_text(value, f"search.score[{n}]") for n, value in enumerate(values)]

    @field_validator("pattern")
    @classmethod
    def _patterns(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Pattern.parse(text, f"search.pattern[{n}]")) for n, text in enumerate(values))

    @model_validator(mode="after")
    def _optuna_needs_samples(self) -> SearchSpec:
        if self.searcher == "optuna" and self.samples is None:
            raise SpecError(
                "search.samples", None, "searcher optuna needs the number of trials; write samples: 20"
            )
        return self


def _score_text(value: Any, key: str) -> Any:
    """`contrastive: {keep: K, against: A}` as `contrastive:K/A`."""
    if isinstance(value, dict) and len(value) == 1:
        (name, sides), *_ = value.items()
        if not isinstance(sides, dict) or set(sides) != {"keep", "against"}:
            raise SpecError(key, repr(value), f"{name} needs both sides; write {two_sides(name)}")
        value = f"{name}:{sides['keep']}/{sides['against']}"
    return str(Scoring.parse(value, key)) if isinstance(value, str) else value


class PerplexitySpec(_Section):
    """Likelihood of held-out lines."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)] = ("en", "fr", "de")
    lines: Count = 64

    @field_validator("languages")
    @classmethod
    def _languages(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_languages(values, "evaluation.perplexity.languages")


def _checked_languages(values: tuple[str, ...], key: str) -> tuple[str, ...]:
    for n, code in enumerate(values):
        name_of(code, f"{key}[{n}]")
    return tuple(dict.fromkeys(values))


class XnliSpec(_Section):
    """Natural language inference by filled templates; the labels say entailment, neutral, contradiction."""

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
    """Reviews by filled templates; the labels say negative, positive."""

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
                raise SpecError(key, repr(pair), "write two languages, source first, as fr-en")
            for code in codes:
                name_of(code, key)
        return tuple(dict.fromkeys(values))


class EvaluationSpec(_Section):
    """What every trial is measured by."""

    perplexity: PerplexitySpec = PerplexitySpec()
    xnli: XnliSpec | None = None
    reviews: ReviewsSpec | None = None
    translation: TranslationSpec | None = None
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness
    task_path: str | None = None
    task_items: Count | None = None

    @field_validator("tasks")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("task_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())


class TrackingSpec(_Section):
    """Where MLflow is. uri null: an sqlite file in the storage; experiment null: the sweep's name."""

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
        return str(Path(value).expanduser().absolute())  # trials run in directories of their own

    def yaml(self) -> str:
        """The whole spec, defaults written out, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def key(self) -> str:
        """A content hash of what the sweep computes; where it runs and is stored does not count."""
        content = self.model_dump_json(exclude={"pipeline", "storage", "tracking"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def storage_folder(self) -> Path:
        return Path(self.storage)

    def anchored(self) -> SweepSpec:
        """The same spec, to be read from any folder: paths that are there made absolute."""
        given = self.calibration
        places = {name: _absolute_if_there(getattr(given, name)) for name in ("corpus", "code")}
        asked = {
            name: task.model_copy(update={"data": _absolute_if_there(task.data)})
            for name in ("xnli", "reviews")
            if (task := getattr(self.evaluation, name)) is not None
        }
        changes = {
            "model": self.model.model_copy(update={"path": _absolute_if_there(self.model.path)}),
            "calibration": given.model_copy(update=places),
            "evaluation": self.evaluation.model_copy(update=asked),
        }
        return self.model_copy(update=changes)

    @property
    def offload_folder(self) -> Path:
        """Where weights that are offloaded to a disk wait."""
        return Path(self.pipeline.offload_folder or self.storage_folder / "offload")

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{self.storage_folder}/mlflow.db"


def _absolute_if_there(path: str) -> str:
    return str(Path(path).absolute()) if path not in ("demo", "sample", "stdlib") and Path(path).exists() else path


def spec_from(values: Mapping[str, Any]) -> SweepSpec:
    """Check plain values whole. Raises SpecError for the first thing wrong with them."""
    try:
        return SweepSpec.model_validate(values)
    except ValidationError as error:
        raise _spec_error(error) from None


def _spec_error(error: ValidationError) -> SpecError:
    first = error.errors()[0]
    names = [part for part in first["loc"] if part not in ("int", "constrained-int") and not _is_union(part)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if first["type"] == "extra_forbidden":
        return SpecError(key, repr(first["input"]), f"unknown key; {_known_beside(names)}")
    if first["type"] == "missing":
        return SpecError(key, "nothing", "this key is needed")
    remedy = _REMEDIES.get(first["type"]) or first["msg"].replace("Input should be", "must be")
    if names == ["pipeline", "worker_memory"]:
        remedy = "must be a size, as 16GiB"
    if names == ["pipeline", "shards"]:
        remedy = "must be a number from 1 to the model's layers, or auto"
    if names[:2] == ["search", "sparsity"] and first["type"] in ("greater_than_equal", "less_than"):
        remedy = "sparsity must be in [0, 1)"
    return SpecError(key, repr(first["input"]), remedy)


_REMEDIES = {
    "tuple_type": "must be a list, as [a, b]",
    "too_short": "must not be empty",
    "model_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "string_type": "must be text; put it in quotes",
    "string_pattern_mismatch": "must be of letters, digits, dots, dashes and underscores",
}


def _is_union(part: str | int) -> bool:
    return isinstance(part, str) and (part.startswith(("literal[", "constrained-")))


def _known_beside(names: list[str | int]) -> str:
    section: Any = SweepSpec
    for name in names[:-1]:
        annotation = section.model_fields[name].annotation
        section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(names[-1]), known, 1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def sweeps_folder() -> Path:
    """The specs that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "sweeps"
    return inside if inside.is_dir() else package.parent / "sweeps"


def load_spec(name: str, assignments: Iterable[str] = ()) -> SweepSpec:
    """Read a spec by path, or by the name of one that comes with the package; then set `key=value`s."""
    file = Path(name)
    if "/" not in name and not _is_file(file):
        file = sweeps_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not _is_file(file):
        known = ", ".join(sorted(path.stem for path in sweeps_folder().glob("*.yaml")))
        raise SpecError("spec", repr(name), f"no such file, and no sweep of that name; known: {known}")
    try:
        values = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, PermissionError) as error:
        raise SpecError("spec", repr(name), "not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise SpecError("spec", repr(name), "a spec is a YAML mapping of keys to values")
    return spec_from(with_assignments(values, assignments))


def as_assignments(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` of every setting that is not None: what options have in common with --set."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if value is not None
    ]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def with_assignments(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` with each `section.key=value` set; the value is read as YAML."""
    result: dict[str, Any] = dict(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise SpecError("--set", repr(assignment), "write key=value, as pipeline.shards=3")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            raise SpecError(key, repr(text), "the value is not YAML") from None
        section = result
        *parents, last = key.split(".")
        for parent in parents:
            inner = section.get(parent) or {}
            if not isinstance(inner, dict):
                raise SpecError(parent, repr(inner), f"is no section, so {key} cannot be set")
            section[parent] = dict(inner)
            section = section[parent]
        section[last] = value
    return result
