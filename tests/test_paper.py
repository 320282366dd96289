"""The sweeps of the paper: complete, with its values, and checked by a dry run.

Models stand in for the hub's: the same families, made on the spot. Questions stand in for XNLI and the reviews.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlprune.cli import main
from mlprune.spec.loading import load_spec
from mlprune.spec.variants import Pattern, Scoring
from tests.tiny_models import config, save

FAMILIES = {
    "paper-xglm-2.9b": ("xglm", "facebook/xglm-2.9B"),
    "paper-xglm-7.5b": ("xglm", "facebook/xglm-7.5B"),
    "paper-mgpt": ("gpt2", "ai-forever/mGPT"),
    "paper-bloom-3b": ("bloom", "bigscience/bloom-3b"),
}
REVIEWS = ("en", "de", "es", "fr", "ja", "zh")
XNLI = ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


def write(folder: Path, languages: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for code in languages:
        (folder / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_values(name: str) -> None:
    spec = load_spec(name)
    assert (spec.model.path, spec.model.dtype) == (FAMILIES[name][1], "float32")
    given = spec.calibration
    assert (given.shots, given.samples, given.max_tokens, given.separator) == (4, 100, 512, None)
    assert given.template == "{language}: {text}"
    assert not given.count_padding
    assert 0.3 in spec.search.sparsity
    assert spec.search.propagation == ("sequential",)
    assert spec.search.pattern == (Pattern(),)
    for code in ("fr", "es", "zh", "hi", "sw"):
        directions = {f"translation:en-{code}", f"translation:{code}-en"}
        assert {f"mono:{code}", *directions} < set(map(str, spec.search.calibration))
        contrasts = {Scoring.parse(f"contrastive:{direction}/code") for direction in directions}
        assert contrasts & set(spec.search.score) == (contrasts if name == "paper-bloom-3b" else set())
    xnli, reviews, translation = spec.evaluation.xnli, spec.evaluation.reviews, spec.evaluation.translation
    assert xnli is not None
    assert xnli.languages == XNLI
    assert xnli.template == "{premise} , right?  {label} , {hypothesis}", "with two spaces, as the paper's code"
    assert xnli.labels == ("Yes", "Also", "No")
    assert (xnli.items, xnli.shuffle_seed) == (1000, 0)
    assert reviews is not None
    assert reviews.languages == REVIEWS
    assert (reviews.items, reviews.shuffle_seed, reviews.max_words) == (1000, 0, 128)
    assert translation is not None
    assert translation.shots == 4
    assert all(pair.endswith("-en") for pair in translation.pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dry_run_goes_through(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name][0]
    # a byte of Hindi is a token of the tests' tokenizer, so four shots of it are long
    long = {"max_position_embeddings": 8192} | ({"n_positions": 8192} if family == "gpt2" else {})
    save(config(family, **long), tmp_path / "model")
    inference = [{"premise": "It rains", "hypothesis": "It is wet", "label": n} for n in range(3)]
    stars = [{"text": "Good", "label": n} for n in range(5)]
    code = [{"content": f"print({n})"} for n in range(100)]
    (tmp_path / "code.jsonl").write_text("\n".join(map(json.dumps, code)))
    settings = {
        "model.path": str(tmp_path / "model"),
        "evaluation.xnli.data": write(tmp_path / "xnli", XNLI, inference),
        "evaluation.reviews.data": write(tmp_path / "reviews", REVIEWS, stars),
        **{f"evaluation.{task}.items": "2" for task in ("xnli", "reviews")},
        "calibration.code": str(tmp_path / "code.jsonl"),
        "storage": str(tmp_path / "store"),
    }
    words = [f"--set={key}={value}" for key, value in settings.items()]
    result = CliRunner().invoke(main, ["sweep", name, "--dry-run", "--json", "-", *words])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    variants = [trial["variant"] for trial in plan["trials"]]
    sparsities, calibrations = 2, 16
    contrasts = 10 if family == "bloom" else 0
    # random and magnitude once a sparsity; wanda and its inverse for every calibration
    assert len(variants) == sparsities * (2 + 2 * calibrations + contrasts)
    assert {variant["propagation"] for variant in variants if variant["calibration"]} == {"sequential"}


def test_the_demos_sweep_is_the_same_experiment_in_small() -> None:
    spec = load_spec("paper-demo")
    assert {"mono:en", "mono:fr", "translation:en-fr", "translation:en-de"} < set(
        map(str, spec.search.calibration)
    )
    assert spec.model.path == "demo"
    assert not any(path.startswith("/") for path in (spec.calibration.corpus, *spec.evaluation.tasks))
    assert spec.evaluation.xnli is None, "XNLI is not there without a network"
