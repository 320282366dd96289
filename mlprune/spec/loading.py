"""Reads a spec file and `key=value` settings into a checked spec.

A spec may come from a stranger. Reading one runs no code from it, and it cannot allow itself to run any: the
keys of COMMAND_LINE_ONLY have their safe value in every file, and can only be changed on the command line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import shlex
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mlprune.errors import SpecError
from mlprune.spec.limits import check_limits, check_url
from mlprune.spec.schema import SweepSpec
from mlprune.spec.urls import is_server, scheme_only, tracking_has_secret

# keys that let code of others run (of a model, a pickle, a task file), and their safe value
COMMAND_LINE_ONLY: Mapping[str, object] = {
    "model.trust_remote_code": False,
    "model.allow_pickle": False,
    "evaluation.task_path": None,
}
_TRACKING = "tracking.uri"


class _Loader(yaml.SafeLoader):
    """A safe loader with the plain scalars of YAML 1.2, which refuses duplicate keys.

    In YAML 1.1 the code of Norwegian, `no`, is false; `2:4` is 124, in base 60; and dates are not text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = [key for key in keys if keys.count(key) > 1]
        if duplicates:
            raise yaml.YAMLError(f"duplicate key {duplicates[0]}")
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
    """Return the plain values of YAML text; its tags run no code. Raises yaml.YAMLError for any fault in it."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        # a value that does not fit its tag
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def parse_spec(values: Mapping[str, object]) -> SweepSpec:
    """Return the checked spec of plain values. Raises SpecError for the first fault in them."""
    try:
        spec = SweepSpec.model_validate(values)
    except ValidationError as error:
        raise _spec_error(error) from None
    check_limits(spec)
    if spec.tracking.uri is None:
        check_url("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", ""))
    if spec.tracking.uri is not None and tracking_has_secret(spec.tracking.uri):
        remedy = (
            "no secrets in specs, which are logged: give the whole address in the environment, as "
            "MLFLOW_TRACKING_URI, or leave the password to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
        raise SpecError(_TRACKING, repr(scheme_only(spec.tracking.uri)), remedy)
    return spec


def _spec_error(error: ValidationError) -> SpecError:
    """Return pydantic's first error as key, value and a remedy in the words of YAML."""
    first = error.errors()[0]
    names = [part for part in first["loc"] if part not in ("int", "constrained-int") and not _is_union(part)]
    if names[:2] == ["search", "mixture"]:  # then its place in a list, and its searcher
        names = [*names[:2], *names[4:]]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if first["type"] == "extra_forbidden":
        return SpecError(key, _short_repr(first["input"]), f"unknown key; {_known_keys(names)}")
    if first["type"] == "missing":
        return SpecError(key, None, "missing required key")
    remedy = _REMEDIES.get(first["type"]) or first["msg"].replace("Input should be", "must be")
    if names[-1:] == ["labels"] and first["type"] in ("too_short", "too_long"):
        count = first["ctx"].get("min_length") or first["ctx"]["max_length"]
        remedy = f"must be {count} words, one for each answer"
    if names == ["pipeline", "worker_memory"]:
        remedy = "must be a size, e.g. 16GiB"
    if names == ["pipeline", "shards"]:
        remedy = "must be a number from 1 to the model's layers, or auto"
    if names[:2] == ["search", "sparsity"] and first["type"] in ("greater_than_equal", "less_than"):
        remedy = "sparsity must be in [0, 1)"
    return SpecError(key, _short_repr(first["input"]), remedy)


_REMEDIES = {
    "tuple_type": "must be a list, e.g. [a, b]",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "model_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "string_type": "must be text; put it in quotes",
    "is_instance_of": "must be text; put it in quotes",
    "string_pattern_mismatch": "may have letters, digits, dots, dashes and underscores only",
}


def _short_repr(value: object) -> str:
    """Return the repr, cut short: with a few anchors, a small YAML text can be larger than memory."""
    return repr(value) if isinstance(value, str | int | float | None) else reprlib.repr(value)[:400]


def _is_union(part: str | int) -> bool:
    return isinstance(part, str) and (part.startswith(("literal[", "constrained-")))


def _known_keys(names: list[str | int]) -> str:
    """Return a hint for an unknown key: the closest key of its section, or all of them."""
    section: type[BaseModel] = SweepSpec
    for name in names[:-1]:
        if isinstance(name, int):  # a place in a list of sections
            continue
        annotation = section.model_fields[name].annotation
        kinds = (*get_args(annotation), annotation)  # a section may be optional
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(names[-1]), known, 1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def sweeps_folder() -> Path:
    """Return the folder of the specs that ship with mlprune: inside the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "sweeps"
    return inside if inside.is_dir() else package.parent / "sweeps"


def spec_file(name: str) -> Path:
    """Return the file that `name` stands for: a path, or the name of a shipped sweep. It may not exist."""
    if "/" in name or _is_file(Path(name)):
        return Path(name)
    return sweeps_folder() / f"{name.removesuffix('.yaml')}.yaml"


def load_spec(name: str, assignments: Iterable[str] = ()) -> SweepSpec:
    """Return the spec of a file, or of a shipped sweep by its name, with `key=value` settings applied."""
    file = spec_file(name)
    if not _is_file(file):
        known = ", ".join(sorted(path.stem for path in sweeps_folder().glob("*.yaml")))
        raise SpecError("spec", repr(name), f"no such file, and no sweep of that name; known: {known}")
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError) as error:
        raise SpecError("spec", repr(name), "not YAML: " + " ".join(str(error).split())) from None
    return parse_spec(apply_assignments(read_values(text, "spec", name), assignments))


def read_values(text: str, key: str, name: str) -> dict[str, object]:
    """Return the values of a spec's text. Raises SpecError, with `key` and `name` for where the text is."""
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise SpecError(key, repr(name), "not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise SpecError(key, repr(name), "a spec is a YAML mapping of keys to values")
    return values


def to_assignments(settings: Mapping[str, object]) -> list[str]:
    """Return `key=value` for every setting that is not None, as --set takes them."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if value is not None
    ]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # e.g. the name is too long
        return False


def apply_assignments(values: Mapping[str, object], assignments: Iterable[str]) -> dict[str, object]:
    """Return a file's `values` with each `section.key=value` set; the value is read as YAML.

    Raises SpecError for what a file may not hold, unless an assignment replaces it.
    """
    assignments = list(assignments)
    _check_file_values(values, [assignment.partition("=")[0] for assignment in assignments])
    return _assign(values, assignments)


def _check_file_values(values: Mapping[str, object], assigned: Sequence[str]) -> None:
    """Raise SpecError if the file sets a key that only the command line may set, and `assigned` does not."""
    kept = _sensitive_values(values)
    for name in assigned:  # a key, or a whole section
        kept = {key: value for key, value in kept.items() if not f"{key}.".startswith(f"{name}.")}
    for key, safe in COMMAND_LINE_ONLY.items():
        if kept.get(key, safe) != safe:
            remedy = "lets code of others run, so a file cannot set it; if you trust it, give: --set "
            raise SpecError(key, _short_repr(kept[key]), remedy + _setting(key, kept[key]))
    uri = str(kept.get(_TRACKING))
    if is_server(uri) and uri != os.environ.get("MLFLOW_TRACKING_URI") and _has_credentials():
        remedy = "your MLflow credentials would be sent there; if they are meant for it, give: --set "
        raise SpecError(_TRACKING, repr(scheme_only(uri)), remedy + f"{_TRACKING}=...")


def _sensitive_values(values: Mapping[str, object]) -> dict[str, object]:
    """Return the keys to be checked, with their values, as far as the file sets them."""
    sensitive = {}
    for key in (*COMMAND_LINE_ONLY, _TRACKING):
        section, _, name = key.partition(".")
        inner = values.get(section)
        if isinstance(inner, dict) and name in inner:
            sensitive[key] = inner[name]
    return sensitive


def _setting(key: str, value: object) -> str:
    """Return `key=value`, quoted for a shell and for YAML."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~-]*/[\w./~-]*", value):
        return f"{key}={value}"
    return shlex.quote(f"{key}={json.dumps(value)}" if isinstance(value, str | bool | int) else f"{key}=...")


def _has_credentials() -> bool:
    """Return whether MLflow has credentials that it would send with its requests."""
    named = any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("PASSWORD", "TOKEN"))
    return named or (Path.home() / ".mlflow" / "credentials").exists()


def _assign(values: Mapping[str, object], assignments: Iterable[str]) -> dict[str, object]:
    """Return a copy of `values` with each assignment applied; sections on the way are copied or created."""
    result = dict(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise SpecError("--set", repr(assignment), "write key=value, e.g. pipeline.shards=3")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            raise SpecError(key, repr(text), "the value is not YAML") from None
        section = result
        *parents, last = key.split(".")
        for parent in parents:
            inner = section.get(parent) or {}
            if not isinstance(inner, dict):
                raise SpecError(parent, _short_repr(inner), f"is not a section, so {key} cannot be set")
            section[parent] = section = dict(inner)
        section[last] = value
    return result
