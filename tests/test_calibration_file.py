"""`mlprune calibration`: the text that a variant is calibrated on, as a file that other tools read."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlprune.cli import main
from tests.tiny_models import source
from tests.work import ready

SETTINGS = ["--set", "calibration.samples=6", "--set", "calibration.shots=2", "--set", "calibration.max_tokens=80"]


def written(tmp_path: Path, kind: str, *options: str, code: int = 0) -> Any:
    file = tmp_path / "out" / "text.jsonl"
    file.parent.mkdir(exist_ok=True)
    words = ["calibration", str(source().folder), "--calibration", kind, "--output", str(file), *SETTINGS]
    result = CliRunner().invoke(main, [*words, *options, "--json", "-"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if not code else result.stderr


def test_the_tokens_are_those_of_the_calibration(tmp_path: Path) -> None:
    """Held to the set that a sweep is calibrated on."""
    values = written(tmp_path, "mix:mono:hi,translation:en-fr", "--format", "tokens")
    rows = [json.loads(line)["input_ids"] for line in Path(values["file"]).read_text().splitlines()]
    options = {"samples": 6, "shots": 2, "max_tokens": 80, "seed": 0}
    prepared = ready(tmp_path, calibration=options)
    sets = [prepared.set_of(name) for name in ("mono:hi", "translation:en-fr")]
    assert rows == [
        list(prompt.ids) for pair in zip(*(one.prompts for one in sets), strict=True) for prompt in pair
    ]
    assert values["prompts"] == 12
    assert values["tokens"] == sum(map(len, rows))


def test_each_form_has_the_same_text(tmp_path: Path) -> None:
    tokenizer = source().tokenizer()
    contents = {}
    for form in ("text", "messages", "tokens", "plain"):
        (folder := tmp_path / form).mkdir()
        contents[form] = Path(written(folder, "mono:en", "--format", form)["file"]).read_text()
    texts = [json.loads(line)["text"] for line in contents["text"].splitlines()]
    messages = [json.loads(line)["messages"] for line in contents["messages"].splitlines()]
    assert messages == [[{"role": "user", "content": text}] for text in texts]
    assert contents["plain"] == "\n\n".join(texts) + "\n"
    ids = [json.loads(line)["input_ids"] for line in contents["tokens"].splitlines()]
    assert [tokenizer(text).input_ids for text in texts] == ids, "another tool makes the same tokens of the text"


@pytest.mark.parametrize(
    ("kind", "noted"),
    [
        ("mono:fr", False),
        ("mix:mono:en,mono:fr", False),
        ("mix:mono:en=0.3,mono:fr=0.7", True),
        ("rank:mono:en,mono:fr", True),
    ],
)
def test_the_card_says_where_the_text_comes_from(kind: str, noted: bool, tmp_path: Path) -> None:
    values = written(tmp_path, kind)
    card = Path(values["card"]).read_text()
    assert "| licence | CC BY-SA 4.0 (NTREX-128) |" in card
    assert card.count("\n| ") - 9 == values["prompts"]
    assert ("a file cannot express" in card) is noted


def test_mistakes_are_answered(tmp_path: Path) -> None:
    file = tmp_path / "out" / "text.jsonl"
    written(tmp_path, "mono:en")
    before = file.read_bytes()
    error = written(tmp_path, "mono:en", code=2)
    assert error == f"mlprune: --output: '{file}': exists already; name a new file\n"
    assert file.read_bytes() == before
    words = ["calibration", str(source().folder), "--output", str(tmp_path / "x.jsonl")]
    assert CliRunner().invoke(main, words).stderr.startswith("mlprune: --calibration: wanda needs it; ")
    both = CliRunner().invoke(main, [*words, "--run", "x", "--spec", "quickstart"])
    assert both.stderr.startswith("mlprune: --spec: 'quickstart': the run determines the spec")
