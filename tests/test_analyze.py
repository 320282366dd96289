"""`mlprune analyze` on a tiny model in this process: files, MLflow run, output and errors."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow.tracking import MlflowClient

from mlprune.analysis.features import ENDS, is_at, overlaps, shares
from mlprune.cli import main
from mlprune.commands.analyze import AnalysisRequest
from mlprune.pruning.masks import PackedMask
from mlprune.shards.worker import ShardWorker
from mlprune.spec.loading import load_spec
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import open_local
from tests import tiny_models

SPEC = """
name: tiny
model: {path: elsewhere}
pipeline: {shards: 1}
calibration: {samples: 5, shots: 2, max_tokens: 100, seed: 5}
search: {score: [magnitude], sparsity: [0.3]}
"""
TABLES = ("features.csv", "overlap.csv", "masks.csv", "top.csv")
PICTURES = ("top.png", "overlap.png", "masks.png", "masks_pairs.png")
CONDITIONS = [
    *("mono:en", "mono:fr", "mono:hi", "translation:en-fr", "translation:en-hi"),
    *("translation:fr-en", "translation:hi-en"),
]
Analysis = tuple[Any, Result, Path]


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_models.source().folder)


def command_line(model: str, place: Path, *words: str) -> list[str]:
    """Return a whole command line; later words override earlier ones."""
    (place / "tiny.yaml").write_text(SPEC)
    start = ["analyze", model, "--spec", str(place / "tiny.yaml"), "--output", str(place / "out")]
    return [*start, "--set", f"storage={place / 'store'}", "--languages", "en,fr,hi", *words]


@pytest.fixture(scope="module")
def analysis(model: str, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Run one command; return its JSON, its result and its folder."""
    place = tmp_path_factory.mktemp("study")
    words = command_line(model, place, "--ratio", "0.2", "--sparsity", "0.4", "--json", str(place / "values.json"))
    result = CliRunner().invoke(main, words)
    assert result.exception is None, result.stderr
    return json.loads((place / "values.json").read_text()), result, place


def rows(place: Path, name: str) -> list[dict[str, str]]:
    with (place / "out" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def magnitudes(place: Path) -> torch.Tensor:
    table = rows(place, "features.csv")
    values = torch.tensor([float(row["magnitude"]) for row in table], dtype=torch.float64)
    return values.reshape(len(CONDITIONS), 1 + 4, 32)


def test_every_condition_is_measured(analysis: Analysis, model: str) -> None:
    values, _, place = analysis
    assert values["conditions"] == CONDITIONS
    settings = [f"model.path={model}", f"storage={place / 'again'}"]
    prepared = prepare(
        load_spec(str(place / "tiny.yaml"), settings), AnalysisRequest(("en", "fr", "hi")).variants(5), False
    )
    with open_local(prepared) as pipeline:
        sums = pipeline.gather_features([prepared.set_of(name) for name in CONDITIONS], 32)
    assert torch.equal(magnitudes(place), torch.stack(sums) / 5), "the mean of five prompts"
    for layer in (1, 4):
        assert len({tuple(row.tolist()) for row in magnitudes(place)[:, layer]}) == len(CONDITIONS)


def test_tables_and_values_agree(analysis: Analysis) -> None:
    values, _, place = analysis
    for end in ENDS:
        expected = overlaps(magnitudes(place), 0.2, end)
        table = [float(row["overlap"]) for row in rows(place, "overlap.csv") if row["other_end"] == end]
        assert table == expected.flatten().tolist()
        assert values["overlap"][end] == expected[..., 1:].mean(2).tolist(), "without the embedding"
    top = magnitudes(place)[[1, 3, 5], 2].max(0).values
    displayed = {int(row["channel"]) for row in rows(place, "top.csv") if row["language"] == "fr"}
    assert displayed == set(is_at(top, 20 / 32, "top").nonzero()[:, 0].tolist())
    assert {row["layer"] for row in rows(place, "top.csv")} == {"2"}, "the middle of four"
    assert {row["language"] for row in rows(place, "top.csv")} == {"fr", "hi"}


def test_masks_are_those_of_a_trial(analysis: Analysis, model: str) -> None:
    """Compare sums over the table, and one pair with the masks that pruning makes."""
    values, _, place = analysis
    table = rows(place, "masks.csv")
    for a, one in enumerate(CONDITIONS):
        for b, other in list(enumerate(CONDITIONS))[a + 1 :]:
            mine = [row for row in table if (row["condition"], row["other"]) == (one, other)]
            assert len(mine) == 4 * 7
            both, either = (sum(int(row[name]) for row in mine) for name in ("both", "either"))
            assert values["masks"][a][b] == values["masks"][b][a] == both / either
            assert 0.25 < both / either < 1
    settings = [f"model.path={model}", f"storage={place / 'store'}"]
    request = AnalysisRequest(("en", "fr", "hi"), sparsity=0.4)
    prepared = prepare(load_spec(str(place / "tiny.yaml"), settings), request.variants(5), False)
    chosen = [request.variants(5)[n] for n in request.indices("fr")[:2]]
    with open_local(prepared) as pipeline:
        gather_moments(prepared, pipeline, chosen)
        pruned = [pipeline.prune(prepared.recipe(variant)) for variant in chosen]
        worker = pipeline._workers[0]
        masks = [worker._masks[variant.key][1]["mlp.up_proj"] for variant in chosen]  # of the second layer
    first, second = (~mask.unpack() for mask in masks if isinstance(mask, PackedMask))
    assert len({made.digest for made in pruned}) == 2
    pair = next(
        row
        for row in table
        if (row["condition"], row["other"]) == ("mono:fr", "translation:en-fr")
        and (row["layer"], row["matrix"]) == ("2", "mlp.up_proj")
    )
    assert (int(pair["both"]), int(pair["either"])) == (int((first & second).sum()), int((first | second).sum()))
    both_CC = torch.tensor([[int(first.sum()), int(pair["both"])], [int(pair["both"]), int(second.sum())]])
    assert float(pair["share"]) == float(shares(both_CC)[0, 1])


def test_run_is_tracked_with_its_files(analysis: Analysis, model: str) -> None:
    values, _, place = analysis
    client = MlflowClient(values["tracking_uri"])
    run = client.get_run(values["run"])
    experiment = client.get_experiment_by_name("analysis")
    assert (experiment.experiment_id, run.info.status) == (run.info.experiment_id, "FINISHED")
    expected = {"model": model, "languages": "en,fr,hi", "pivot": "en", "layer": "2", "ratio": "0.2"}
    assert run.data.params.items() >= (expected | {"sparsity": "0.4", "samples": "5", "seed": "5"}).items()
    assert {file.path for file in client.list_artifacts(values["run"])} == {*TABLES, *PICTURES}
    copy = Path(client.download_artifacts(values["run"], "features.csv"))
    assert copy.read_bytes() == (place / "out/features.csv").read_bytes()


def test_output_shows_figures_and_locations(analysis: Analysis) -> None:
    values, result, place = analysis
    displayed, places = result.stdout.split("\nfiles ")
    lines = displayed.splitlines()
    assert max(map(len, lines)) <= 100
    for code, name, pair in [
        *(("fr", "French (fr)", "en-fr"), ("fr", "French (fr)", "fr-en")),
        *(("hi", "Hindi (hi)", "en-hi"), ("hi", "Hindi (hi)", "hi-en")),
    ]:
        a, b = CONDITIONS.index(f"mono:{code}"), CONDITIONS.index(f"translation:{pair}")
        top, bottom = values["overlap"]["top"], values["overlap"]["bottom"]
        figures = [top[a][b], bottom[b][a], bottom[a][b], values["masks"][a][b]]
        (line,) = [line for line in lines if name in line and pair in line]
        assert line.split()[-4:] == [f"{figure:.3f}" for figure in figures]
    assert f"{place / 'out'}: features.csv, " in places
    assert f"ui --backend-store-uri {values['tracking_uri']}" in places
    assert {path.name for path in (place / "out").iterdir()} == {*TABLES, *PICTURES}
    assert values["files"] == [str(place / "out" / name) for name in (*TABLES, *PICTURES)]


def test_any_pivot_and_layer(model: str, tmp_path: Path) -> None:
    """An empty folder is accepted; a named experiment is used."""
    (tmp_path / "out").mkdir()
    words = ("--languages", "fr,en", "--pivot", "hi", "--layer", "0", "--json", "-")
    settings = ("--set", "tracking.experiment=mine", "--set", "calibration.samples=2")
    result = CliRunner().invoke(main, command_line(model, tmp_path, *words, *settings))
    assert result.exception is None, result.stderr
    values = json.loads(result.stdout)
    from_pivot, to_pivot = ["translation:hi-fr", "translation:hi-en"], ["translation:fr-hi", "translation:en-hi"]
    assert values["conditions"] == ["mono:fr", "mono:en", *from_pivot, *to_pivot]
    assert values["layer"] == 0
    assert MlflowClient(values["tracking_uri"]).get_experiment_by_name("mine") is not None


# errors


@pytest.mark.parametrize(
    ("words", "start", "remedy"),
    [
        ("--languages en,xq", "--languages: 'xq': ", "ISO 639"),
        ("--languages en,fr --pivot french", "--pivot: 'french': ", "ISO 639"),
        ("--languages fr", "--languages: 'fr': ", "two or more"),
        ("--languages en,en", "--languages: 'en': ", "two or more"),
        ("--languages en,eu", "calibration.corpus: 'sample': ", "has no eu"),
        ("--pivot eu", "calibration.corpus: 'sample': ", "has no eu"),
        ("--ratio 0", "--ratio: 0.0: ", "(0, 0.5]"),
        ("--ratio 0.6", "--ratio: 0.6: ", "(0, 0.5]"),
        ("--ratio nan", "--ratio: nan: ", "(0, 0.5]"),
        ("--ratio 0.02", "--ratio: 0.02: ", "32 channels"),
        ("--sparsity 1", "--sparsity: 1.0: ", "(0, 1)"),
        ("--layer 5", "--layer: 5: ", "the model has 4 layers; write 0 (the embedding) to 4"),
        ("--layer -1", "--layer: -1: ", "write 0 (the embedding) to 4"),
        ("--output PLACE/full", "--output: 'PLACE/full': ", "is not empty"),
        ("--output PLACE/tiny.yaml", "--output: 'PLACE/tiny.yaml': ", "not a folder"),
        ("--output PLACE/tiny.yaml/out", "--output: 'PLACE/tiny.yaml/out': ", "not a folder"),
        ("--set tracking.uri=nonsense://x", "tracking.uri: 'nonsense://x': ", "MLflow"),
    ],
)
def test_mistakes_are_reported_before_weights_are_loaded(
    words: str, start: str, remedy: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlprune.sweep.session.ShardWorker", lambda *_: pytest.fail("weights are loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    options = words.replace("PLACE", str(tmp_path)).split()
    result = CliRunner().invoke(main, command_line(model, tmp_path, *options))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith(f"mlprune: {start.replace('PLACE', str(tmp_path))}")
    assert remedy in result.stderr
    assert not (tmp_path / "out").exists()


def test_hidden_states_that_are_not_finite_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ShardWorker.take_features
    broken = lambda self: {key: sums * float("nan") for key, sums in measured(self).items()}  # noqa: E731
    monkeypatch.setattr(ShardWorker, "take_features", broken)
    result = CliRunner().invoke(main, command_line(str(tiny_models.source().folder), tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "mlprune: model.dtype: auto: the hidden states are not finite" in result.stderr
    assert not (tmp_path / "out").exists()
