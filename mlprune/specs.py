"""A spec file, and `key=value` settings, to a checked spec."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from mlprune.config import SweepSpec
from mlprune.errors import SpecError


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
    if names[-1:] == ["labels"] and first["type"] in ("too_short", "too_long"):
        remedy = f"must be {first['ctx'].get('min_length') or first['ctx']['max_length']} words, one an answer"
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
