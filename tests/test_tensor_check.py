"""Checkpoints that do not fit their config, or are quantised, are refused by name before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlprune.commands.checkpoint import write_checkpoint
from mlprune.errors import ModelError
from mlprune.models import quantization
from mlprune.models.hollow import FAMILIES, LoadedPart, Span, load_hollow
from mlprune.models.source import ModelSource, find_model
from mlprune.models.tensor_check import check_tensors
from tests import tiny_models
from tests.tiny import change_config

WEIGHT = "model.layers.1.mlp.down_proj.weight"  # [32, 48]
QUERY = "model.layers.0.self_attn.q_proj.weight"  # [32, 32]
BEFORE = "name the model before quantisation"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.source().folder, tmp_path / "model"))


def change(folder: Path, edit: Callable[[Tensors], object]) -> ModelSource:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return find_model(str(folder))


def refused(source: ModelSource, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_tensors(source)
    line = str(caught.value)
    assert line.startswith(f"model.path: {source.name}: ")
    assert "\n" not in line
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family_are_accepted(family: str) -> None:
    check_tensors(tiny_models.source(family))


# quantised weights


def as_fp8(tensors: Tensors, scale: str | None) -> None:
    """Convert a matrix to FP8 with one scale, as modelopt and others do."""
    weight = tensors[WEIGHT]
    factor = weight.abs().max() / 448
    tensors[WEIGHT] = (weight / factor).to(torch.float8_e4m3fn)
    if scale:
        tensors[WEIGHT + scale] = factor


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv", None])
def test_fp8_weights_without_a_quantization_config_are_refused(folder: Path, scale: str | None) -> None:
    refused(change(folder, lambda tensors: as_fp8(tensors, scale)), WEIGHT, "float8_e4m3fn", BEFORE)


@pytest.mark.parametrize("method", ["modelopt", "gptq", "awq", "bitsandbytes", "tomorrow", None, 7])
def test_other_quantisations_are_refused_by_name(folder: Path, method: object) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(change(folder, lambda tensors: as_fp8(tensors, "_scale")), f"quantised ({method})", BEFORE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e5m2])
def test_integer_weights_are_refused(folder: Path, dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    refused(
        change(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})), WEIGHT, kind, BEFORE
    )


def test_scales_beside_plain_weights_are_refused(folder: Path) -> None:
    source = change(folder, lambda tensors: tensors.update({f"{WEIGHT}_scale": torch.ones(())}))
    refused(source, f"has {WEIGHT}_scale", "does not use")


def in_blocks(tensors: Tensors, block: int) -> Tensors:
    """Convert the matrices of all layers to FP8 with a scale for each block; return them as they are then."""
    plain = {}
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = (size // block for size in tensors[name].shape)
        blocks = tensors[name].reshape(rows, block, columns, block)
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        plain[name] = (stored.float() * scale[:, None, :, None]).reshape(tensors[name].shape)
        tensors[name] = stored.reshape(tensors[name].shape)
        tensors[f"{name}_scale_inv"] = scale
    return plain


def fp8_model(folder: Path, block: int = 16, **config: Any) -> tuple[ModelSource, Tensors]:
    plain: Tensors = {}
    change(folder, lambda tensors: plain.update(in_blocks(tensors, block)))
    scheme = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    change_config(folder, quantization_config=scheme | config)
    return find_model(str(folder)), plain


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fp8_in_blocks_is_converted(family: str, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    folder = tmp_path / "model"
    tiny_models.save(tiny_models.config(family, **sizes), folder)
    source, plain = fp8_model(folder)
    check_tensors(source)
    whole = shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((whole / "config.json").read_text())
    del config["quantization_config"]
    (whole / "config.json").write_text(json.dumps(config))
    names = [name for name in load_file(folder / "model.safetensors") if name.endswith("_scale_inv")]

    def convert(tensors: Tensors) -> None:
        tensors.update(plain)
        for name in names:
            del tensors[name]

    expected = load_hollow(change(whole, convert), LoadedPart.whole(Span(0, 4, 4)), torch.float32).state_dict()
    for part in (LoadedPart.whole(Span(0, 4, 4)), LoadedPart.layer(2)):
        weights = load_hollow(source, part, torch.float32).state_dict()
        assert {name for name in expected if part.head or ".layers.2." in name} <= weights.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_fp8_with_one_scale_for_each_matrix_is_converted(folder: Path) -> None:
    plain: Tensors = {}

    def edit(tensors: Tensors) -> None:
        as_fp8(tensors, "_scale_inv")
        plain[WEIGHT] = tensors[WEIGHT].float() * tensors[f"{WEIGHT}_scale_inv"]

    source = change(folder, edit)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    check_tensors(source)
    weights = load_hollow(source, LoadedPart.whole(Span(0, 4, 4)), torch.float32).state_dict()
    assert torch.equal(weights[WEIGHT], plain[WEIGHT])


def test_a_converted_model_is_exported_without_quantisation(folder: Path, tmp_path: Path) -> None:
    source, _ = fp8_model(folder)
    weights = load_hollow(source, LoadedPart.whole(Span(0, 4, 4)), torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = source.config()
    config.dtype = torch.bfloat16
    write_checkpoint(source, config, [weights], {}, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    exported = find_model(str(tmp_path / "out"))
    check_tensors(exported)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("A line", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    exported_weights = model.state_dict()
    assert [name for name in weights if not torch.equal(exported_weights[name], weights[name])] == []


def test_fp8_without_its_package_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = fp8_model(folder)
    monkeypatch.setattr(quantization, "is_accelerate_available", lambda: False)
    refused(source, "pip install 'mlprune[fp8]'")


def without_scale(tensors: Tensors) -> None:
    del tensors[f"{WEIGHT}_scale_inv"]


def with_fewer_scales(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale_inv"] = tensors[f"{WEIGHT}_scale_inv"][:1]


def without_weight(tensors: Tensors) -> None:
    del tensors[WEIGHT]


@pytest.mark.parametrize(
    ("edit", "words"),
    [(without_scale, "missing"), (with_fewer_scales, "[1, 3]"), (without_weight, "without its weight")],
)
def test_fp8_without_its_scales_is_refused(edit: Callable[[Tensors], None], words: str, folder: Path) -> None:
    fp8_model(folder)
    refused(change(folder, edit), WEIGHT, words)


@pytest.mark.parametrize("config", [{"weight_block_size": [32, 32]}, {"scale_fmt": "ue8m0"}])
def test_unknown_kinds_of_fp8_are_refused(config: dict[str, Any], folder: Path) -> None:
    """Rows of 48 in blocks of 32: transformers would take two blocks of 24."""
    refused(fp8_model(folder, **config)[0], BEFORE)


@pytest.mark.parametrize("block", [[0, 0], [16], "16", [[]]])
def test_invalid_blocks_of_fp8_are_refused(block: object, folder: Path) -> None:
    refused(fp8_model(folder, weight_block_size=block)[0])


# tensors that do not fit the config


def test_more_layers_than_configured_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    refused(find_model(str(folder)), "has model.layers.3.input_layernorm.weight and 8 more", "does not use")


def test_fewer_layers_than_configured_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=5)
    refused(find_model(str(folder)), "lacks model.layers.4.input_layernorm.weight and 8 more")


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "transposed": (lambda weight: weight.T, "[48, 32]"),
    "flat": (lambda weight: weight.flatten(), "[1536]"),
    "cut": (lambda weight: weight[:-1], "[31, 48]"),
    "empty": (lambda weight: weight[:0], "[0, 48]"),
    "scalar": (lambda weight: weight[0, 0], "[]"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_are_refused(shape: str, folder: Path) -> None:
    make, words = SHAPES[shape]
    source = change(folder, lambda tensors: tensors.update({WEIGHT: make(tensors[WEIGHT])}))
    refused(source, f"{WEIGHT} is {words} in the checkpoint, and [32, 48] by its config.json")


def test_another_vocabulary_is_refused(folder: Path) -> None:
    change_config(folder, vocab_size=400)
    refused(find_model(str(folder)), "[384, 32]", "[400, 32] by its config.json")


def test_leftovers_that_transformers_ignores_are_accepted(folder: Path, tmp_path: Path) -> None:
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(4)}
    check_tensors(change(folder, lambda tensors: tensors.update(frequencies)))
    gpt2 = Path(shutil.copytree(tiny_models.source("gpt2").folder, tmp_path / "gpt2"))
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for n in range(4)}
    check_tensors(change(gpt2, lambda tensors: tensors.update(masks)))


def test_pickled_weights_are_compared_too(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    check_tensors(find_model(str(folder), allow_pickle=True))
    torch.save(tensors | {QUERY: tensors[QUERY].char()}, folder / "pytorch_model.bin")
    refused(find_model(str(folder), allow_pickle=True), QUERY, "int8", BEFORE)
