"""`mlprune prune`: the written checkpoint has exactly the metrics of the evaluated variant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlprune.commands import checkpoint as export
from mlprune.commands.evaluate import evaluate_checkpoint
from mlprune.commands.prune import prune
from mlprune.errors import StorageError
from mlprune.models.quiet import quiet_transformers
from mlprune.spec.variants import Variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.trial import trial_metrics
from tests.tiny_models import config, save, source
from tests.work import CONTRASTIVE, MIXED, OWL, RANDOM, SEQUENTIAL, SPARSE_2_4, SPARSEGPT, WANDA, opened, ready


def evaluated(storage: Path, model: Any, variant: Variant) -> dict[str, float]:
    prepared = ready(storage, model)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        make_masks(prepared, pipeline, variant)
        return trial_metrics(prepared.suite.run(pipeline, variant.key))


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", WANDA),
        ("llama", SEQUENTIAL),
        ("gpt2", MIXED),
        ("bloom", SPARSE_2_4),
        ("mixtral", SEQUENTIAL),
        ("qwen3_moe", RANDOM),
        ("gemma3_text", WANDA),
        ("xglm", SEQUENTIAL),
        ("llama", OWL),
        ("bloom", CONTRASTIVE),
        ("gpt2", SPARSEGPT),
        ("mixtral", SPARSEGPT),
    ],
    ids=str,
)
def test_the_checkpoint_has_the_metrics_of_the_variant(family: str, variant: Variant, tmp_path: Path) -> None:
    before = evaluated(tmp_path / "a", source(family), variant)
    spec = ready(tmp_path / "b", source(family), shards=1).spec
    prune(spec, variant, tmp_path / "out")
    exported = spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(tmp_path / "out")})})
    after = evaluate_checkpoint(exported)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "mixtral", "opt", "gemma2"])
def test_from_pretrained_loads_all_weights(family: str, tmp_path: Path) -> None:
    prune(ready(tmp_path, source(family)).spec, SEQUENTIAL, tmp_path / "out")
    load: Any = AutoModelForCausalLM.from_pretrained
    with quiet_transformers():
        pruned, info = load(tmp_path / "out", output_loading_info=True)
        dense = load(source(family).folder)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    zeros = weights = 0
    for name, parameter in pruned.named_parameters():
        original = dense.get_parameter(name)
        assert torch.equal(parameter[parameter != 0], original[parameter != 0]), name
        zeros += int((parameter == 0).sum() - (original == 0).sum())
        weights += parameter.numel()
    manifest = json.loads((tmp_path / "out" / "mlprune.json").read_text())
    assert zeros == manifest["sparsity"]["dropped"] > 0


def test_tensor_names_are_those_of_the_original(tmp_path: Path) -> None:
    """Experts are stacked when loaded and separate on disk; other readers expect them separate."""
    from safetensors import safe_open

    prune(ready(tmp_path, source("mixtral")).spec, RANDOM, tmp_path / "out")
    names = []
    for folder in (source("mixtral").folder, tmp_path / "out"):
        with safe_open(folder / "model.safetensors", "pt") as opened_file:
            names.append(sorted(opened_file.keys()))
    assert names[0] == names[1]
    assert any("experts.3" in name for name in names[0])


def test_many_shards_and_files_write_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ready(tmp_path, shards=1)
    prune(prepared.spec, WANDA, tmp_path / "one")
    monkeypatch.setattr(export, "FILE_BYTES", 60_000)
    prepared = ready(tmp_path, shards=3)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        make_masks(prepared, pipeline, WANDA)
        model, weights = prepared.source, pipeline.weights(WANDA.key)
        export.write_checkpoint(model, model.config(), weights, {}, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    load: Any = AutoModelForCausalLM.from_pretrained
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_the_model_is_kept(dtype: str, tmp_path: Path) -> None:
    tied = config("llama", tie_word_embeddings=True)
    model = save(tied, tmp_path / "model", dtype)
    prune(ready(tmp_path, model).spec, WANDA, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fails)
    spec = ready(tmp_path / "store").spec
    with pytest.raises(StorageError, match="No space left"):
        prune(spec, WANDA, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
