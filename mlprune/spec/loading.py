"""A spec file, and `key=value` settings, to a checked spec.

A spec may come from a stranger. Reading it runs no code of its maker's, and it cannot grant itself what would: the
keys of GRANTED have their harmless value in every file, and another one on the command line alone.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from mlprune.errors import SpecError
from mlprune.spec.schema import SweepSpec
from mlprune.spec.urls import is_server, scheme_only, tracking_has_secret

# keys that let code run which others wrote (of a model, a pickle, a task's file), and their harmless value
GRANTED: Mapping[str, object] = {
    "model.trust_remote_code": False,
    "model.allow_pickle": False,
    "evaluation.task_path": None,
}
_TRACKING = "tracking.uri"


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


def spec_from(values: Mapping[str, Any]) -> SweepSpec:
    """Check plain values whole. Raises SpecError for the first thing wrong with them."""
    try:
        made = SweepSpec.model_validate(values)
    except ValidationError as error:
        raise _spec_error(error) from None
    if made.tracking.uri is not None and tracking_has_secret(made.tracking.uri):
        remedy = (
            "no secrets in specs, which are logged: give the whole address in the environment, as "
            "MLFLOW_TRACKING_URI, or leave the password to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
        raise SpecError(_TRACKING, repr(scheme_only(made.tracking.uri)), remedy)
    return made


def _spec_error(error: ValidationError) -> SpecError:
    first = error.errors()[0]
    names = [part for part in first["loc"] if part not in ("int", "constrained-int") and not _is_union(part)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    if first["type"] == "extra_forbidden":
        return SpecError(key, _shown(first["input"]), f"unknown key; {_known_beside(names)}")
    if first["type"] == "missing":
        return SpecError(key, None, "missing required key")
    remedy = _REMEDIES.get(first["type"]) or first["msg"].replace("Input should be", "must be")
    if names[-1:] == ["labels"] and first["type"] in ("too_short", "too_long"):
        remedy = f"must be {first['ctx'].get('min_length') or first['ctx']['max_length']} words, one an answer"
    if names == ["pipeline", "worker_memory"]:
        remedy = "must be a size, as 16GiB"
    if names == ["pipeline", "shards"]:
        remedy = "must be a number from 1 to the model's layers, or auto"
    if names[:2] == ["search", "sparsity"] and first["type"] in ("greater_than_equal", "less_than"):
        remedy = "sparsity must be in [0, 1)"
    return SpecError(key, _shown(first["input"]), remedy)


_REMEDIES = {
    "tuple_type": "must be a list, as [a, b]",
    "too_short": "must not be empty",
    "model_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "string_type": "must be text; put it in quotes",
    "is_instance_of": "must be text; put it in quotes",
    "string_pattern_mismatch": "must be of letters, digits, dots, dashes and underscores",
}


def _shown(value: object) -> str:
    """As repr, cut short: a few anchors of YAML can stand for more than fits in memory."""
    return repr(value) if isinstance(value, str | int | float | None) else reprlib.repr(value)[:400]


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
    package = Path(__file__).parents[1]
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
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError) as error:
        raise SpecError("spec", repr(name), "not YAML: " + " ".join(str(error).split())) from None
    return spec_from(with_assignments(read_values(text, "spec", name), assignments))


def read_values(text: str, key: str, name: str) -> dict[str, Any]:
    """The values of a spec's text. Raises SpecError, with `key` and `name` for where it stood."""
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise SpecError(key, repr(name), "not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise SpecError(key, repr(name), "a spec is a YAML mapping of keys to values")
    return values


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
    """`values`, as a file has them, with each `section.key=value` set; the value is read as YAML.

    Raises SpecError for what no file may hold, where no assignment takes its place.
    """
    assignments = list(assignments)
    _check_granted(values, [assignment.partition("=")[0] for assignment in assignments])
    return _assigned(values, assignments)


def _check_granted(values: Mapping[str, Any], assigned: Sequence[str]) -> None:
    kept = _given(values)
    for name in assigned:  # of a key, or of a whole section
        kept = {key: value for key, value in kept.items() if not f"{key}.".startswith(f"{name}.")}
    for key, harmless in GRANTED.items():
        if kept.get(key, harmless) != harmless:
            remedy = "lets code of others run, so no file grants it; if you trust it, give: --set "
            raise SpecError(key, _shown(kept[key]), remedy + _setting(key, kept[key]))
    uri = str(kept.get(_TRACKING))
    if is_server(uri) and uri != os.environ.get("MLFLOW_TRACKING_URI") and _credentials():
        remedy = "your credentials for MLflow would go there; if they are meant for it, give: --set "
        raise SpecError(_TRACKING, repr(scheme_only(uri)), remedy + f"{_TRACKING}=...")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that are looked at, with their values, where a file has them."""
    found = {}
    for key in (*GRANTED, _TRACKING):
        section, _, name = key.partition(".")
        inner = values.get(section)
        if isinstance(inner, dict) and name in inner:
            found[key] = inner[name]
    return found


def _setting(key: str, value: object) -> str:
    """`key=value` for a shell and for YAML."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~-]*/[\w./~-]*", value):
        return f"{key}={value}"
    return shlex.quote(f"{key}={json.dumps(value)}" if isinstance(value, str | bool | int) else f"{key}=...")


def _credentials() -> bool:
    """Whether MLflow has any to send with its requests."""
    named = any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("PASSWORD", "TOKEN"))
    return named or (Path.home() / ".mlflow" / "credentials").exists()


def _assigned(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
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
                raise SpecError(parent, _shown(inner), f"is no section, so {key} cannot be set")
            section[parent] = dict(inner)
            section = section[parent]
        section[last] = value
    return result
