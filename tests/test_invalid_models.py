"""Invalid checkpoints end in one line that names the file, within seconds and before work starts."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlprune.errors import ModelError
from mlprune.models.source import find_model
from tests import tiny_models
from tests.invalid_models import read_header, use_model, write_header
from tests.tiny import change_config

WEIGHT = "model.layers.0.mlp.up_proj.weight"
DEEP = "[" * 100_000
CONFIG = "config.json"
MILLION, BILLION = 10**6, 10**9
SECONDS = 20  # a refusal takes a fraction of one; the machine may be busy


def copy(family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.source(family).folder, tmp_path / "model"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    return copy("llama", tmp_path)


def refused(folder: Path, *words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        use_model(folder)
    line = str(caught.value)
    assert line.startswith("model.")
    assert line.isprintable()
    assert len(line) < 1500
    assert [word for word in words if word not in line] == []
    assert time.monotonic() - start < SECONDS


# values of config.json

QUANTIZATIONS: list[Any] = [{}, 5, "x", [], {"load_in_8bit": True}]
EMPTY_OR_TRUE: list[Any] = [{}, True]
VALUES: list[tuple[str, str, Any, str]] = [
    *(("llama", "num_hidden_layers", value, "num_hidden_layers") for value in (0, -1, MILLION, 10**12, 1.5, "4")),
    *(("llama", "num_attention_heads", value, CONFIG) for value in (0, -1, 3, BILLION, "x", None)),
    *(("llama", "num_key_value_heads", value, "num_key_value_heads") for value in (0, -1, 3, 8, "x")),
    *(("llama", "head_dim", value, "head_dim") for value in (0, -1, 7, BILLION, "x")),
    ("llama", "head_dim", 16, "k_proj.weight is [16, 32] in the checkpoint, and [32, 32] by its config.json"),
    *(("llama", "hidden_size", value, CONFIG) for value in (0, -1, 33, 10**12, "x")),
    *(("llama", "intermediate_size", value, CONFIG) for value in (0, -1, 10**15, 47)),
    *(("llama", "vocab_size", value, CONFIG) for value in (0, -1, 10**15, 383, 385)),
    *(("llama", "hidden_act", value, CONFIG) for value in ("tomorrow", None, 7)),
    *(("llama", "pad_token_id", value, CONFIG) for value in (MILLION, -MILLION, 384, "x")),
    *(("llama", "num_labels", value, CONFIG) for value in (BILLION, -BILLION, "many")),
    *(("llama", "max_position_embeddings", value, CONFIG) for value in (0, -1, 10**30, "x")),
    *(("llama", "_attn_implementation", value, CONFIG) for value in ("flash_attention_2", "tomorrow", 5)),
    ("llama", "_attn_implementation", "flex_attention", "write one of eager, sdpa"),
    *(("llama", "rope_parameters", value, CONFIG) for value in ({"rope_type": "tomorrow"}, 5)),
    *(("llama", "rms_norm_eps", value, CONFIG) for value in ("x", None, math.nan, math.inf)),
    *(("llama", "sliding_window", value, "sliding_window") for value in ("x", 0, -1)),
    *(("llama", "text_config", value, "text_config") for value in ({}, 5, {"vocab_size": 0})),
    ("llama", "text_config", {"num_hidden_layers": 10**7}, "1,000 at most"),
    *(("llama", "layer_types", value, CONFIG) for value in (["x"], ["full_attention"], 5)),
    *(("llama", "dtype", value, CONFIG) for value in ("nonsense", "int8", "float8_e4m3fn")),
    *(("llama", "quantization_config", value, "") for value in QUANTIZATIONS),
    ("llama", "transformers_weights", "other.safetensors", "remove this key"),
    *(
        ("llama", key, value, "remove this key")
        for key in ("fusion_config", "attribute_map")
        for value in EMPTY_OR_TRUE
    ),
    ("llama", "return_dict", False, "remove this key"),
    *(("llama", key, 5, "remove this key") for key in ("to_dict", "save_pretrained", "__class__")),
    ("gpt2", "num_key_value_heads", " ", "num_key_value_heads"),
    ("opt", "head_dim", 8.5, "head_dim"),
    ("bloom", "num_key_value_heads", [4], CONFIG),
    ("gpt2", "n_layer", 0, "num_hidden_layers 0"),
    ("gpt2", "n_layer", BILLION, "n_layer 1000000000: 1,000 at most"),
    ("gpt2", "n_positions", 10**7, "transformer.wpe.weight is [512, 32]"),
    ("gpt2", "activation_function", "x", CONFIG),
    ("bloom", "n_head", 0, "num_attention_heads 0"),
    ("mixtral", "num_experts_per_tok", 5, "at most its 4 experts"),
    ("mixtral", "num_local_experts", 10**8, CONFIG),
    ("qwen3_moe", "decoder_sparse_step", 0, CONFIG),
    ("gemma2", "sliding_window", None, "sliding_window"),
    ("gemma2", "query_pre_attn_scalar", 0, CONFIG),
    ("xglm", "max_position_embeddings", 10**8, "100,000 at most"),
]


@pytest.mark.parametrize(("family", "key", "value", "words"), VALUES, ids=lambda value: str(value)[:24])
def test_values_of_the_config(
    family: str, key: str, value: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    folder = copy(family, tmp_path)
    change_config(folder, **{key: value})
    refused(folder, words)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "llama", "a": ' + DEEP,
        '{"model_type": "llama", "a": ' + "[" * 50 + "]" * 50 + "}",
        '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
    ],
)
def test_text_of_the_config(text: str, folder: Path) -> None:
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG)


def test_unusual_values_that_are_harmless(folder: Path) -> None:
    changes = {"pad_token_id": -1, "eos_token_id": [1, 2], "architectures": None, "transformers_version": None}
    change_config(folder, **changes, _name_or_path="x", return_dict=True, task_specific_params={"update": 1})
    use_model(folder)


# headers of weight files


def with_entry(**changes: object) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        header, body = read_header(file)
        write_header(file, header | {WEIGHT: header[WEIGHT] | changes}, body)

    return edit


def overlap(file: Path) -> None:
    header, body = read_header(file)
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    write_header(file, header, body)


def with_name(name: str) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        header, body = read_header(file)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        write_header(file, header | {name: empty}, body)

    return edit


HEADERS: dict[str, Callable[[Path], object]] = {
    "unknown dtype": with_entry(dtype="F9"),
    "dtype of another size": with_entry(dtype="F16"),
    "negative shape": with_entry(shape=[-1, -1536]),
    "overflowing shape": with_entry(shape=[2**40, 2**40]),
    "text as shape": with_entry(shape="x"),
    "overflowing offsets": with_entry(data_offsets=[0, 2**63]),
    "negative offsets": with_entry(data_offsets=[-8, 8]),
    "reversed offsets": with_entry(data_offsets=[100, 0]),
    "text as offsets": with_entry(data_offsets="xy"),
    "overlap": overlap,
    "deep": lambda file: write_header(file, b'{"a": ' + DEEP.encode(), b""),
    "list": lambda file: write_header(file, [], b""),
    "no UTF-8": lambda file: write_header(file, b'{"\xff": 1}', b""),
    "longer than the file": lambda file: write_header(file, {}, b"", 2**63),
    "empty file": lambda file: file.write_bytes(b""),
    "metadata no object": lambda file: write_header(file, {"__metadata__": 5}, b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, folder: Path) -> None:
    HEADERS[case](folder / "model.safetensors")
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["\x1b[31mred\n\x07", "a" * MILLION, "....", "\u202egnp"])
def test_names_of_tensors_are_displayed_harmlessly(name: str, folder: Path) -> None:
    with_name(name)(folder / "model.safetensors")
    refused(folder, "which the model of its config.json does not use")


# the index


def write_index(folder: Path, **changes: object) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    weight_map = dict.fromkeys(read_header(folder / "a.safetensors")[0], "a.safetensors")
    index = {"metadata": {}, "weight_map": weight_map} | changes
    text = json.dumps({key: value for key, value in index.items() if value is not ...})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("metadata", [..., None, [5], "x"])
def test_index_without_metadata(metadata: object, folder: Path) -> None:
    write_index(folder, metadata=metadata)
    refused(folder, 'model.safetensors.index.json has no "metadata"')


@pytest.mark.parametrize("files", ["a.safetensors", ["a"], {"a": 5}, {"a": {}}, {"a": "b\0.safetensors"}, {}])
def test_files_of_an_index(files: object, folder: Path) -> None:
    write_index(folder, weight_map=files)
    refused(folder, "model.safetensors.index.json")
    write_index_of_a_long_name(folder)
    refused(folder, "model.safetensors.index.json")


def write_index_of_a_long_name(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "b" * 300 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_deep_index(folder: Path) -> None:
    write_index(folder)
    use_model(folder)
    (folder / "model.safetensors.index.json").write_text(DEEP)
    refused(folder, "model.safetensors.index.json")


# tokenizer and generation_config.json


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SETTINGS: list[tuple[str, object]] = [
    ("model_max_length", "many"),
    ("padding_side", "x"),
    ("bos_token", 5),
    ("pad_token", {"a": 1}),
    ("added_tokens_decoder", {"x": {}}),
    ("extra_special_tokens", 5),
    ("model_input_names", 5),
    ("init_inputs", 5),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=lambda value: str(value))
def test_settings_of_the_tokenizer(key: str, value: object, folder: Path) -> None:
    change(folder / "tokenizer_config.json", **{key: value})
    refused(folder, "its tokenizer cannot be read")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [DEEP.encode(), b"[]", b"\xff\xfe", b"{"])
def test_files_of_the_tokenizer(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)
    refused(folder, "its tokenizer cannot be read")


@pytest.mark.parametrize("normalizer", [None, {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}])
def test_tokenizer_that_makes_no_tokens(normalizer: object, folder: Path) -> None:
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    if normalizer is None:
        model |= {"vocab": {}, "merges": []}
    change(file, normalizer=normalizer, model=model)
    refused(folder, "its tokenizer makes no tokens")


@pytest.mark.parametrize("text", ["{", "[]", DEEP, "\0"])
def test_generation_config(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    refused(folder, "generation_config.json")


def test_a_config_alone_is_bounded_too(folder: Path) -> None:
    change_config(folder, num_labels=BILLION)
    with pytest.raises(ModelError, match="num_labels"):
        find_model(str(folder / CONFIG), weights=False)
