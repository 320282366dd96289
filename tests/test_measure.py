"""`mlprune measure`: sizes are exact, speeds are those of the work that is described."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from mlprune.cli import main
from mlprune.commands import measure as module
from mlprune.commands.prune import prune
from mlprune.models.structures import FEED_FORWARD
from mlprune.sweep.grid import parse_variant
from tests.tiny_models import config, save, source
from tests.work import ready

LONG: Any = {"max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with half of its channels."""
    place = tmp_path_factory.mktemp("models")
    model = save(config("llama", **LONG), place / "dense")
    half = parse_variant(None, "magnitude", 0.5, "channels", "dense")
    prune(ready(place / "store", model, variants=[half]).spec, half, place / "half")
    return place / "dense", place / "half"


def test_sizes_are_exact_and_ratios_are_to_the_first(folders: tuple[Path, Path]) -> None:
    words = ["measure", *map(str, folders), "--rounds", "1", "--json", "-"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["models"]
    for row, folder in zip(rows, folders, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert row["parameters"] == sum(one.numel() for one in model.parameters())
        assert row["disk"] == (folder / "model.safetensors").stat().st_size
        assert row["prefill"] > 0 < row["decode"]
    assert set(rows[0]["ratios"].values()) == {1.0}
    removed = 4 * 3 * 32 * 24  # layers, matrices, width, channels
    assert rows[1]["parameters"] == rows[0]["parameters"] - removed
    assert rows[1]["ratios"]["parameters"] == rows[1]["parameters"] / rows[0]["parameters"]
    assert "x0." in result.stderr
    assert FEED_FORWARD["llama"].sizes.keys() == {"intermediate_size"}


def test_what_is_timed(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole text at once, and then as many single tokens as are said to be written."""
    model: Any = AutoModelForCausalLM.from_pretrained(folders[0])
    timed: list[list[int]] = []
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def seconds(work: Any, device: torch.device) -> float:
        lengths.clear()
        work()
        timed.append(list(lengths))
        return 1.0

    monkeypatch.setattr(module, "_seconds", seconds)
    ids = torch.zeros(1, module.PROMPT, dtype=torch.long)
    with torch.inference_mode():
        module._prefill_seconds(model, ids)
        module._decode_seconds(model, ids)
    assert timed == [[module.PROMPT], [1] * module.WRITTEN]


def test_mistakes_are_answered_before_any_measurement(folders: tuple[Path, Path]) -> None:
    for words, line in (
        ([str(folders[0]), "/no/model"], "mlprune: model.path: "),
        (
            [str(folders[0]), str(source().folder)],
            f"mlprune: MODEL: '{source().folder}': takes 512 tokens",
        ),
        (["demo", "--set", "x=1"], "mlprune: --set: 'x=1': measure reads no spec; leave it out"),
    ):
        result = CliRunner().invoke(main, ["measure", *words])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(line)
