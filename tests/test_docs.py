"""What the documents say is so: the specs they show are specs, the keys they list are the keys there are."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from click import Command, Context
from pydantic import BaseModel

from mlprune.cli import main
from mlprune.models.hollow import FAMILIES
from mlprune.models.structures import FEED_FORWARD, HEADS
from mlprune.pruning.scores import SCORES
from mlprune.pruning.structured import UNIT_SCORES
from mlprune.report.ranking import LEGEND
from mlprune.spec.calibrations import Calibration, CombinationKind
from mlprune.spec.loading import load_spec, parse_spec, sweeps_folder
from mlprune.spec.schema import DEFAULT_STORAGE, SweepSpec
from mlprune.spec.variants import Allocation, Pattern
from mlprune.sweep.grid import variants_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readmes_spec_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    spec = parse_spec(yaml.safe_load(block.replace("2:4", "'2:4'")))
    assert len(variants_of(spec.search)) == 2 + 4 * 2 + 1 + 4  # magnitude, wanda; then 2:4 of both


@pytest.mark.parametrize("file", sorted(sweeps_folder().glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_are_specs(file: Path) -> None:
    assert load_spec(file.stem).name == file.stem


def leaves(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key of the spec, and its default; None where there is none."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = None if field.is_required() else field.default
    return found


def test_the_table_of_keys_is_that_of_the_spec() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|(.*?)\|", (ROOT / "docs" / "spec.md").read_text(), re.MULTILINE)
    listed = {key: text.strip(" `") for key, text in rows if "." in key or key in SweepSpec.model_fields}
    for manifest_key in ("model", "calibration"):
        listed.pop(manifest_key, None)
    keys = leaves(SweepSpec)
    assert listed.keys() == keys.keys()
    for key, default in keys.items():
        shown = yaml.safe_load(listed[key]) if listed[key] else None
        if isinstance(default, tuple):
            default = [str(item) if isinstance(item, Pattern) else item for item in default]
        assert shown == default, key
    assert keys["storage"] == DEFAULT_STORAGE


def test_the_tables_of_rules_and_combinations_are_complete() -> None:
    text = (ROOT / "docs" / "spec.md").read_text()
    (table,) = re.findall(r"^\| combination \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    examples = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert [Calibration.parse(one).combination.kind for one in examples] == list(get_args(CombinationKind))
    (table,) = re.findall(r"^\| `score` \| importance of a weight.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    names = [name for row in table.splitlines() for name in re.findall(r"`(.*?)`", row.split("|")[1])]
    assert names == list(SCORES)
    (table,) = re.findall(r"^\| `allocation` \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    names = [name for row in table.splitlines() for name in re.findall(r"`(.*?)`", row.split("|")[1])]
    assert names == list(get_args(Allocation))
    (table,) = re.findall(r"^\| `score` \| importance of a unit.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert re.findall(r"^\| `(.*?)`", table, re.MULTILINE) == list(UNIT_SCORES)
    for structure, known in (("Channels", FEED_FORWARD), ("Heads", HEADS)):
        (families,) = re.findall(rf"^{structure} are removed from ([\w,\s]+);", text, re.MULTILINE)
        assert re.split(r",\s|\sand\s", families) == sorted(known)


def test_the_readme_shows_a_ranking_as_it_is_printed() -> None:
    (headers,) = re.findall(r"^ +(score  .*)$", README, re.MULTILINE)
    assert re.split(" {2,}", headers) == ["score", "sparsity", "calibration", "loss", "to the best", "confirmed"]
    units = "documents (lines, where the corpus names no documents)"
    assert all(f"    {line}\n" in README for line in LEGEND.format(units=units, spread="").splitlines())


def test_the_readme_lists_the_families() -> None:
    (row,) = re.findall(r"^\| models \| (.*?); ", README, re.MULTILINE)
    assert row.replace("gemma3 (text)", "gemma3_text").split(", ") == list(FAMILIES)


@pytest.mark.parametrize("line", re.findall(r"^ {4}(mlprune (?:.*\\\n)*.*)$", README, re.MULTILINE))
def test_the_readmes_commands_are_understood(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    command = main.commands[name]
    assert isinstance(command, Command)
    command.make_parser(Context(command)).parse_args(words)


def test_the_tests_that_documents_name_exist() -> None:
    for file in (ROOT / "SECURITY.md", ROOT / "docs" / "reliability.md"):
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", file.read_text())
        assert len(named) > 10
        for module, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / module).read_text(), re.MULTILINE), test


def test_contributing_names_what_exists() -> None:
    """Every test, file and all-caps constant in backticks, and every link."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = "\n".join(
        file.read_text() for folder in ("tests", "mlprune") for file in (ROOT / folder).rglob("*.py")
    )
    names = re.findall(r"`(test_\w+|[A-Z_]{4,})`", text)
    assert len(names) > 5
    placeholders = {"NAME", "LAYOUT"}
    missing = [name for name in names if not re.search(rf"^(def )?{name}\b", source, re.MULTILINE)]
    assert [name for name in missing if name not in placeholders] == []
    paths = [file for file in re.findall(r"`((?:mlprune|tests|docs)/[\w/]+\.\w+)`", text) if "NAME" not in file]
    assert [file for file in paths if not (ROOT / file).exists()] == []
    links = [link for link in re.findall(r"\]\(([\w/.]+)\)", text) if not (ROOT / link).exists()]
    assert links == []
