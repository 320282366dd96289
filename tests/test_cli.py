"""The command line where nothing is wrong, on tiny models in this process: what it prints, writes and computes."""

import json
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlprune
import mlprune.commands.checkpoint
import mlprune.sweep.plan
import mlprune.sweep.status
from mlprune import console
from mlprune.cli import main
from mlprune.data.corpora import open_corpus, split_held_out
from mlprune.models.source import find_model
from mlprune.spec.loading import load_spec, read_yaml
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import variants_of
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import prepare
from mlprune.sweep.session import open_local
from mlprune.sweep.status import RunningSweep
from mlprune.tracking.tracker import SweepTracker
from tests import tiny_models
from tests.tiny import SAMPLE, tokenizer

SPEC = """
name: tiny
model: {path: MODEL}
pipeline: {shards: 1}
calibration: {samples: 4, shots: 2, max_tokens: 48, seed: 5}
search:
  calibration: ["mono:en", "mono:fr", "translation:en-fr"]
  score: [magnitude, wanda]
  sparsity: [0.3]
  propagation: [dense]
evaluation: {perplexity: {languages: [en, fr], lines: 3}}
"""
PRUNE = ("--spec", "tiny.yaml", "--calibration", "translation:en-fr", "--sparsity", "0.3", "--output", "out")
NAMES = {"English": "en", "French": "fr"}


@pytest.fixture
def model() -> str:
    return str(tiny_models.source().folder)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> Path:
    """The working directory, with tiny.yaml in it; one shard, so no Ray."""
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SPEC.replace("MODEL", json.dumps(model)))
    return tmp_path


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, words)
    if result.exception is not None:
        raise AssertionError(result.stderr) from result.exception
    return result


def strict_json(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def values_of(*words: str) -> Any:
    """What the command writes with --json FILE."""
    run(*words, "--json", "values.json")
    return strict_json(Path("values.json").read_text(encoding="utf-8"))


def sample(code: str) -> list[str]:
    return (SAMPLE / f"{code}.txt").read_text("utf-8").split("\n")


def metrics_of(*words: str) -> dict[str, float]:
    """The metrics of `evaluate`, without the time that it took."""
    found: dict[str, float] = values_of("evaluate", *words, "--spec", "tiny.yaml")["metrics"]
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


def plain_metrics(folder: str, languages: tuple[str, ...], lines: int) -> dict[str, float]:
    """The same by hand: every held-out line of the sample alone, after the token that begins a sequence."""
    loaded, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    corpus = open_corpus("sample", languages)
    metrics, all_bits = {}, []
    for code in languages:
        nll = tokens = size = 0.0
        for index in split_held_out(corpus, confirm=True).selection[:lines]:
            text = corpus.lines[code][index]
            ids = torch.tensor([[words.bos_token_id, *words(text, add_special_tokens=False).input_ids]])
            with torch.inference_mode():
                likelihood = loaded(ids).logits[0, :-1].double().log_softmax(-1)
            nll -= likelihood.gather(1, ids[0, 1:, None]).sum().item()
            tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
        metrics[f"perplexity.{code}"] = math.exp(nll / tokens)
        metrics[f"bits_per_byte.{code}"] = nll / math.log(2) / size
        all_bits.append(metrics[f"bits_per_byte.{code}"])
    mean = sum(all_bits) / len(all_bits)
    return metrics | {"bits_per_byte": mean, "bits_per_byte.mean": mean, "bits_per_byte.worst": max(all_bits)}


def weights_of(folder: str) -> dict[str, Tensor]:
    """The checkpoint's weights by transformers, once nothing is missing in it and nothing too many."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return {name: tensor.clone() for name, tensor in loaded.state_dict().items()}


# evaluate


def test_evaluation_is_what_plain_transformers_compute(model: str) -> None:
    expected = plain_metrics(model, ("hi", "en"), 3)
    assert metrics_of(model, "--languages", "hi,en") == pytest.approx(expected, rel=1e-5)
    assert values_of("evaluate", model, "--spec", "tiny.yaml").keys() == {"model", "metrics"}


@pytest.mark.parametrize(
    "command", ["evaluate MODEL --spec tiny.yaml", "sweep tiny.yaml --dry-run", "prune MODEL"]
)
def test_standard_output_is_json_alone(command: str, model: str) -> None:
    words = [model if word == "MODEL" else word for word in command.split()]
    result = run(*words, *(PRUNE if words[0] == "prune" else ()), "--json", "-")
    assert isinstance(strict_json(result.stdout), dict)


def test_any_folder_name_is_found_and_shown(model: str, place: Path) -> None:
    name = "été 😀=[v2]"  # JSON escapes it, and rich would take [v2] for markup
    shutil.copytree(model, place / name)
    table = run("evaluate", name, "--spec", "tiny.yaml").stdout
    assert all(part in table for part in (name, "English (en)", "French (fr)")), table
    assert metrics_of(name) == metrics_of(model)


def test_few_positions_are_enough_where_nothing_is_calibrated(place: Path) -> None:
    tiny_models.save(tiny_models.config("llama", max_position_embeddings=250), place / "short")
    metrics = values_of("evaluate", "short", "--languages", "en", "--set", "evaluation.perplexity.lines=2")
    assert metrics["metrics"]["bits_per_byte.en"] > 0


def test_corpus_may_come_in_any_form(model: str) -> None:
    lines = {code: sample(code)[100:160] for code in ("en", "fr")}
    rows = list(zip(*lines.values(), strict=True))
    Path("texts").mkdir()
    for code, text in lines.items():
        Path("texts", f"{code}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    Path("texts.tsv").write_text("\n".join("\t".join(row) for row in [tuple(lines), *rows]), encoding="utf-8")
    Path("texts.jsonl").write_text("\n".join(json.dumps({"en": en, "fr": fr}) for en, fr in rows))
    found = [metrics_of(model, "--corpus", name) for name in ("texts", "texts.tsv", "texts.jsonl")]
    assert found[0] == found[1] == found[2]
    assert found[0] != metrics_of(model)


# sweep --dry-run


def test_dry_run_counts_and_makes_nothing(place: Path) -> None:
    before = {path.name for path in place.iterdir()}
    plan = values_of("sweep", "tiny.yaml", "--dry-run", "--set", "search.propagation=[dense,sequential]")
    assert {path.name for path in place.iterdir()} - before <= {"values.json", "cache"}
    variants = [trial["variant"] for trial in plan["trials"]]
    assert [v["score"] for v in variants].count("magnitude") == 1  # one for all calibrations and propagations
    assert len(variants) == len({trial["key"] for trial in plan["trials"]}) == 1 + 3 * 2
    assert plan["finished"] == []
    assert list(plan["passes"].values()) == [3, 3, 7 + 1]  # calibration, sequential pruning, evaluation
    kinds = {"process", "weights", "working", "hidden", "activations", "moments", "masks", "logits", "writing"}
    (shard,) = plan["shards"]
    assert (plan["residency"], shard["layers"]) == ("resident", [0, 3])
    assert shard["memory_bytes"].keys() == kinds | {"host", "disk", "total"}
    assert shard["memory_bytes"]["total"] == sum(shard["memory_bytes"][kind] for kind in kinds)
    assert plan["disk_bytes"] > 0


SETTINGS = """
name: other
model: {path: elsewhere, dtype: bfloat16, revision: v1, trust_remote_code: true, allow_pickle: true}
pipeline: {shards: 3, residency: zero, offload: nvme, offload_folder: /fast, ranks_per_shard: 2,
           replicas: 2, wait_minutes: 5,
  worker_memory: 1024}
calibration: {corpus: texts.tsv, samples: 7, shots: 3, max_tokens: 99, seed: 11, template: "{text}",
  separator: "|", count_padding: true, code: sources}
search: {calibration: ["mono:no", "mix:mono:en=0.5,mono:fr=0.5"], score: [random], sparsity: [0.1, 0.25],
  pattern: ["2:4"], allocation: [owl], propagation: [sequential], repair: [least-squares],
  seed: [3, 4], samples: 2, searcher: random,
  objective: worst, screen: 6, racing: true, pretraining: {"no": 0.75, sw: 0.25},
  mixture: [{searcher: optuna, parts: ["mono:no", code], combination: power=2, trials: 4, evaluate: 2,
    objective: mean},
    {searcher: minimax, parts: ["mono:no", "translation:no-sw"], combination: rank, rounds: 3, eta: 1.5}]}
claims: [{claim: better, better: "wanda mono:no", than: dense, metric: loss.sw, languages: []}]
evaluation:
  perplexity: {languages: ["no", "sw"], lines: 5, confirmation_lines: 4}
  xnli:
    {languages: ["no"], data: questions, items: 3, shuffle_seed: 5, template: "{premise}{label}{hypothesis}",
     labels: [a, b, c]}
  reviews:
    {languages: [sw], data: reviews, items: 4, shuffle_seed: 6, max_words: 7, template: "{review}{label}",
     labels: [a, b]}
  translation: {pairs: [no-sw], shots: 2, lines: 6, max_new_tokens: 8}
  tasks: [xnli_fr]
  task_path: /tasks
  task_items: 9
storage: /somewhere/else
tracking: {uri: "http://server:5000", experiment: ours}
"""


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_key_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[SweepSpec] = []
    monkeypatch.setattr(mlprune.sweep.plan, "plan_sweep", specs.append)  # it plans nothing, so showing it fails
    asked = leaves(read_yaml(SETTINGS))
    settings = [word for key, value in asked.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    CliRunner().invoke(main, ["sweep", "tiny.yaml", "--dry-run", *settings])
    assert leaves(json.loads(specs[0].model_dump_json())) == asked


# prune


def test_pruned_checkpoint_is_an_ordinary_one_with_its_zeros(model: str) -> None:
    run("prune", model, *PRUNE)
    dense, pruned = weights_of(model), weights_of("out")
    assert dense.keys() == pruned.keys()
    for name, weight in dense.items():
        if ".layers." in name and weight.ndim == 2:
            dropped = pruned[name] == 0
            assert dropped.sum(1).tolist() == [int(weight.shape[1] * 0.3)] * len(weight)
            weight = weight.masked_fill(dropped, 0)
        assert torch.equal(pruned[name], weight)
    assert metrics_of("out") == pytest.approx(plain_metrics("out", ("en", "fr"), 3), rel=1e-5)
    assert metrics_of("out") != metrics_of(model)


def weights_count(folder: str) -> int:
    return sum(weight.numel() for weight in weights_of(folder).values())


def test_manifest_says_how_to_make_it_again(model: str) -> None:
    manifest = values_of(
        "prune", model, *PRUNE, "--set", "calibration.max_tokens=400", "--set", "calibration.seed=8"
    )
    assert manifest == strict_json(Path("out/mlprune.json").read_text(encoding="utf-8"))
    expected = {"calibration": "translation:en-fr", "score": "wanda", "sparsity": 0.3}
    plain = {"pattern": "unstructured", "propagation": "sequential", "allocation": "uniform", "seed": 8}
    assert manifest["variant"] == {**expected, **plain, "repair": "none"}
    assert manifest["size"] == {"parameters": weights_count("out"), "bytes": 4 * weights_count("out")}
    fingerprint = find_model(model).fingerprint()
    assert manifest["model"] == {"path": model, "fingerprint": fingerprint, "dtype": "float32"}
    settings = {"corpus": "sample", "samples": 4, "shots": 2, "max_tokens": 400, "seed": 8}
    layout = {"template": "{language}: {text}", "separator": None, "count_padding": False, "code": "stdlib"}
    assert manifest["calibration"] == settings | layout
    assert manifest["mlprune"] == mlprune.__version__
    share = manifest["sparsity"]
    assert len(share["layers"]) == 4
    assert sum(share["layers"]) / 4 == pytest.approx(share["actual"])
    assert share["actual"] == pytest.approx(share["dropped"] / share["weights"]) == pytest.approx(0.3, abs=0.02)
    text = {name: sample(code) for name, code in NAMES.items()}
    assert len({prompt["tokens"] for prompt in manifest["prompts"]} - {400}) > 1  # counts that tell lines apart
    assert len(manifest["prompts"]) == 4
    for prompt in manifest["prompts"]:
        assert (prompt["corpus"], prompt["kind"], len(prompt["lines"])) == ("sample", "translation:en-fr", 2)
        words = "".join(f"{name}: {text[name][line - 1]}</s>" for line in prompt["lines"] for name in NAMES)
        assert prompt["tokens"] == len(tokenizer()(words, truncation=True, max_length=400).input_ids)


def test_large_checkpoint_is_several_files(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ("prune", model, "--spec", "tiny.yaml", "--score", "magnitude", "--pattern", "2:4", "--output")
    run(*one, "whole")
    monkeypatch.setattr(mlprune.commands.checkpoint, "FILE_BYTES", 60_000)
    run(*one, "parts")
    index = strict_json(Path("parts/model.safetensors.index.json").read_text())
    files = {path.name for path in Path("parts").glob("*.safetensors")}
    assert len(set(index["weight_map"].values()) & files) == len(files) > 2
    assert [path.name for path in Path("whole").glob("*.safetensors*")] == ["model.safetensors"]
    whole, parts = weights_of("whole"), weights_of("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)


def tracked(*settings: str) -> tuple[SweepTracker, SweepSpec, Variant]:
    """A sweep as MLflow knows it, and one of its variants."""
    spec = load_spec("tiny.yaml", ["search.score=[wanda]", *settings])
    tracker = SweepTracker(spec.tracking_uri, "ours", spec.storage_folder / "mlartifacts", spec.key, spec.name)
    tracker.log_sweep({}, {"spec.yaml": spec.yaml()})
    variant = variants_of(spec.search, spec.calibration.seed)[1]
    tracker.start_trial("key", variant)
    tracker.start_trial("dense", None)
    assert tracker.flush(10, print)
    return tracker, spec, variant


@pytest.mark.parametrize("sparsity", ["0.3", "0.1234567"])
def test_trial_of_a_sweep_is_exported_by_its_run(sparsity: str, model: str) -> None:
    tracker, _, variant = tracked(f"search.sparsity=[{sparsity}]")
    by_run = values_of("prune", "--run", tracker.run_id("key"), "--output", "by-run")
    assert by_run["variant"] == variant.to_dict()
    options = ("--calibration", "mono:fr", "--sparsity", sparsity, "--propagation", "dense")
    assert by_run == values_of("prune", model, "--spec", "tiny.yaml", *options, "--output", "by-hand")


@pytest.mark.parametrize("score", ["contrastive:mono:fr/mono:en", "sparsegpt"])
def test_trial_of_any_score_is_exported_by_its_run(score: str) -> None:
    settings = (f"search.score=['{score}']", "search.sparsity=[0.3,0.5]", "search.allocation=[owl]")
    tracker, _, variant = tracked(*settings)
    assert (variant.score.name, variant.allocation) == (score.partition(":")[0], "owl")
    manifest = values_of("prune", "--run", tracker.run_id("key"), "--output", "by-run")
    assert manifest["variant"] == variant.to_dict()
    assert len(set(manifest["sparsity"]["layers"])) > 1


def test_trial_of_a_seed_is_exported_with_its_own_masks() -> None:
    """The digests are those of masks that are made as in a sweep, from text of the trial's seed."""
    tracker, spec, variant = tracked("search.calibration=['mono:fr']", "search.seed=[3,1]")
    assert variant.seed == 1
    variants = variants_of(spec.search)
    prepared = prepare(spec, variants, evaluate=False)
    with open_local(prepared) as pipeline:
        gather_moments(prepared, pipeline, variants)
        digests = {one.seed: make_masks(prepared, pipeline, one).digest for one in variants}
    assert digests[1] != digests[3]
    manifest = values_of("prune", "--run", tracker.run_id("key"), "--output", "by-run")
    assert manifest["masks"]["digest"] == digests[1]
    assert manifest["variant"] == variant.to_dict()


def test_run_that_cannot_be_exported_is_answered() -> None:
    tracker, spec, _ = tracked()
    trial, dense = tracker.run_id("key"), tracker.run_id("dense")
    shutil.rmtree(spec.storage_folder / "mlartifacts")  # only the database was carried here
    for run_id in (dense, tracker.parent_id, trial):
        result = CliRunner().invoke(main, ["prune", "--run", run_id, "--output", "out"])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith(f"mlprune: --run: '{run_id}': ")


# logging


@pytest.mark.parametrize(
    ("option", "printed"),
    [
        (["-q"], "warning: w\n"),
        (["--quiet"], "warning: w\n"),
        ([], "i\nwarning: w\n"),
        (["-v"], "mlprune.tests: d\ni\nwarning: w\n"),
        (["--quiet", "--verbose"], "mlprune.tests: d\ni\nwarning: w\n"),  # the last one counts
    ],
)
def test_verbosity_selects_the_messages(option: list[str], printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def log() -> list[RunningSweep]:
        logger = logging.getLogger("mlprune.tests")
        logger.debug("d")
        logger.info("%s", "i")
        logger.warning("w")
        with console.step("working"):
            pass
        return []

    monkeypatch.setattr(mlprune.sweep.status, "running_sweeps", log)
    result = run("status", *option)
    assert result.stdout == "no sweep runs on this machine\n"
    lines = result.stderr.splitlines(keepends=True)
    assert "".join(line for line in lines if "working" not in line) == printed
    assert any("working" in line for line in lines) is ("-q" not in option and option != ["--quiet"])


# what answers at once


@pytest.mark.parametrize("words", ["--version", "--help", "sweep --help", "prune --help", "evaluate --help"])
def test_help_is_quick(words: str) -> None:
    code = f"import sys; from mlprune.cli import main; main({words.split()}, standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 3
    assert (mlprune.__version__ if words == "--version" else "Usage: ") in done.stdout
