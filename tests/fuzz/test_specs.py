"""Specs: every value and every text is a spec, or a SpecError of one line."""

import json
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlprune.errors import UserError
from mlprune.spec.loading import load_spec, parse_spec, read_values, spec_file
from mlprune.spec.schema import SweepSpec
from mlprune.sweep.grid import variants_of
from tests.fuzz.values import CASES, check_line, values
from tests.test_docs import leaves

KEYS = [
    *leaves(SweepSpec),
    "search",
    "evaluation",
    "evaluation.xnli.languages",
    "evaluation.reviews.data",
    "claims",
]
KNOWN = (
    *("wanda", "magnitude", "sparsegpt", "contrastive", "contrastive:mono:fr/code", "ria", "random"),
    *("mono:en", "translation:en-fr", "code", "mix:mono:en=0.5,mono:fr=0.5", "mix:mono:en=1e9", "mono:qq"),
    *("unstructured", "2:4", "0:0", "64:64", "uniform", "owl", "dense", "sequential", "optuna", "worst"),
    *(
        "en",
        "fr",
        "demo",
        "sample",
        "s3://a/b",
        "sqlite:///x.db",
        "http://[::1",
        "{text}",
        "{text.__class__}",
        "1GiB",
    ),
)
INSERTED = ["&a ", "*a", "!!python/object:os.x ", "[" * 2000, "<<: ", "\t"]
QUICKSTART = spec_file("quickstart").read_text()


def check(values_of_spec: dict[str, object]) -> None:
    """Check the values, and that what is accepted is read back from its own YAML, with the same trials."""
    try:
        spec = parse_spec(values_of_spec)
    except UserError as error:
        check_line(error)
        return
    again = parse_spec(yaml.safe_load(spec.yaml()))
    assert again == spec
    assert again.key == spec.key


@CASES
@given(st.dictionaries(st.sampled_from(KEYS), values(*KNOWN), min_size=1, max_size=3))
def test_settings(settings: dict[str, Any]) -> None:
    assignments = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        spec = load_spec("quickstart", assignments)
        if len(spec.search.calibration) < 20:
            variants_of(spec.search)
    except UserError as error:
        check_line(error)
        return
    check(spec.model_dump(mode="json"))


@CASES
@given(st.integers(0, len(QUICKSTART)), st.integers(0, 30), st.text(max_size=10) | st.sampled_from(INSERTED))
def test_changed_text(start: int, length: int, inserted: str) -> None:
    text = QUICKSTART[:start] + inserted + QUICKSTART[start + length :]
    try:
        read = read_values(text, "spec", "x")
    except UserError as error:
        check_line(error)
        return
    check(read)
