"""Checkpoints: every change of a model's files is refused in one line, or the model loads and runs."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlprune.errors import UserError
from tests import tiny_models
from tests.fuzz.values import CASES, check_line, values
from tests.invalid_models import read_header, use_model, write_header

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "opt")
WORDS = ("sdpa", "eager", "silu", "gelu", "full_attention", "sliding_attention", "float16", "default", "yarn")
EXTRA = ("rope_scaling", "layer_types", "quantization_config", "num_labels", "text_config", "sliding_window")
DTYPES = ["F32", "F16", "BF16", "I8", "U8", "F8_E4M3", "BOOL", "F64", "F4", "X"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FILES = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@functools.cache
def keys(family: str) -> list[str]:
    return [*json.loads((tiny_models.source(family).folder / CONFIG).read_text()), *EXTRA]


def fresh(family: str) -> Path:
    folder = Path("model")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_models.source(family).folder, folder)
    return folder


def use(folder: Path) -> None:
    try:
        use_model(folder)
    except UserError as error:
        check_line(error)


@CASES
@given(st.sampled_from(FAMILIES), st.data())
def test_values_of_the_config(family: str, data: st.DataObject) -> None:
    folder = fresh(family)
    config = json.loads((folder / CONFIG).read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(keys(family)), values(*WORDS), min_size=1, max_size=2))
    (folder / CONFIG).write_text(json.dumps(config | changes))
    use(folder)


@CASES
@given(st.data(), st.sampled_from(["dtype", "shape", "data_offsets"]))
def test_entries_of_the_header(data: st.DataObject, field: str) -> None:
    folder = fresh("llama")
    header, body = read_header(folder / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(header)))
    numbers = st.lists(st.sampled_from([0, 1, 8, 32, 48, 384, -1, 2**40, 2**63, len(body)]), max_size=3)
    value: Any = data.draw(st.one_of(st.sampled_from(DTYPES), numbers, values()))
    write_header(folder / WEIGHTS, header | {name: header[name] | {field: value}}, body)
    use(folder)


@CASES
@given(
    st.sampled_from(FILES),
    st.data(),
)
def test_changed_bytes(name: str, data: st.DataObject) -> None:
    folder = fresh("llama")
    content = bytearray((folder / name).read_bytes())
    start = data.draw(st.integers(0, min(len(content), 6000)))
    length = data.draw(st.integers(0, 20))
    content[start : start + length] = data.draw(st.binary(max_size=20))
    (folder / name).write_bytes(content)
    use(folder)
