"""Resolving a model's name to a folder: error messages, fingerprints and hub downloads."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    dynamic_module_utils,
)

from mlprune.errors import ModelError
from mlprune.models.fingerprint import fingerprint as fingerprint_of_files
from mlprune.models.source import ModelSource, find_model
from tests.tiny import SIZES, as_pickle, as_two_files, change_config, refused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    """A model's folder with safetensors; fingerprints go to the test's own cache."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


# folders


def test_folder_is_resolved_with_its_config_and_dtype(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    source = find_model("tiny")
    assert source.name == "tiny"
    assert source.folder == tiny  # absolute: a worker runs elsewhere
    assert source.config().hidden_size == 16
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301 (our own bytes)


def test_dtype_is_the_checkpoints_own_or_the_requested_one(tiny: Path) -> None:
    assert find_model(str(tiny)).dtype("auto") == torch.float32
    change_config(tiny, dtype="bfloat16")
    source = find_model(str(tiny))
    assert source.dtype("auto") == torch.bfloat16
    assert source.dtype("float16") == torch.float16
    config = json.loads((tiny / "config.json").read_text())
    del config["dtype"]
    (tiny / "config.json").write_text(json.dumps(config))
    assert source.dtype("auto") == torch.float32
    with pytest.raises(ModelError, match=r"model\.dtype: int8: write auto, float32"):
        source.dtype("int8")


def test_invalid_names(tiny: Path) -> None:
    for name in ("./nowhere", "/no/where", "~/nowhere-at-all", "~nobody-here/x", "a/b/c"):
        refused(name, "no such folder")
    refused("", "name a folder, a Hugging Face model id, or demo")
    refused(tiny / "config.json", "a file", "config.json")
    refused(tiny, "v2", "only a Hugging Face model id", key="model.revision", revision="v2")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, f"no config.json in {tmp_path}", "name a Hugging Face model's folder")


def test_gguf_file(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "model.gguf")
    refused(tiny, "its weights are GGUF", "convert them with transformers")
    (tiny / "config.json").unlink()
    refused(tiny, "its weights are GGUF", "convert them with transformers")


def test_malformed_config(tiny: Path) -> None:
    for text in ("{", "\xff", '{"model_type": "llama", "hidden_size": "wide"}'):
        (tiny / "config.json").write_bytes(text.encode("latin-1"))
        refused(tiny, "config.json cannot be read")
    for text in ("[]", "{}", '{"model_type": ["llama"]}'):
        (tiny / "config.json").write_text(text)
        refused(tiny, "names no model_type")


def test_model_that_is_not_a_causal_language_model(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    refused(tmp_path, "a t5 is not a causal language model", weights=False)


def test_unknown_model_type(tiny: Path) -> None:
    change_config(tiny, model_type="tomorrow")
    refused(tiny, "does not know model_type 'tomorrow'", "upgrade")


def test_a_models_own_code_needs_trust(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tiny.parent / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the modules' folder is put on it
    code = """
from transformers import LlamaConfig
class TomorrowConfig(LlamaConfig):
    model_type = "tomorrow"
"""
    (tiny / "tomorrow.py").write_text(code)
    names = {"AutoConfig": "TomorrowConfig", "AutoModelForCausalLM": "TomorrowForCausalLM"}
    auto_map = {key: f"tomorrow.{name}" for key, name in names.items()}
    change_config(tiny, model_type="tomorrow", auto_map=auto_map)
    refused(tiny, "model.trust_remote_code=true if you trust it")
    source = find_model(str(tiny), trust_remote_code=True)
    assert type(source.config()).__name__ == "TomorrowConfig"
    before = source.fingerprint()
    (tiny / "tomorrow.py").write_text(code + "X = 1\n")
    assert source.fingerprint() != before  # the code may have changed what the weights mean


def test_folder_without_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    refused(tiny, "no weights in", "model.safetensors or model.safetensors.index.json", "model.allow_pickle=true")
    refused(tiny, "no weights in", "pytorch_model.bin", allow_pickle=True)
    assert find_model(str(tiny), weights=False).config().vocab_size == 32


def test_index_that_names_absent_files(tiny: Path) -> None:
    first, *others = as_two_files(tiny)
    assert others
    assert [path.name for path in find_model(str(tiny)).weight_files()] == [path.name for path in (first, *others)]
    first.unlink()
    refused(tiny, "model.safetensors.index.json names", f"{first.name}, not in")
    others[0].unlink()
    refused(tiny, f"{first.name} and 1 more")
    (tiny / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(tiny, "names no file")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index(tiny: Path, text: str) -> None:
    (tiny / "model.safetensors").rename(tiny / "elsewhere.safetensors")
    (tiny / "model.safetensors.index.json").write_text(text)
    refused(tiny, "model.safetensors.index.json cannot be read")


def test_pickled_weights_need_consent(tiny: Path) -> None:
    as_pickle(tiny)
    refused(tiny, "convert it to safetensors", "model.allow_pickle=true if you trust it")
    source = find_model(str(tiny), allow_pickle=True)
    assert [path.name for path in source.weight_files()] == ["pytorch_model.bin"]


def test_missing_tokenizer(tiny: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer cannot be read") as caught:
        find_model(str(tiny)).tokenizer()
    assert "\n" not in str(caught.value)


# fingerprints


def fingerprint(folder: Path, allow_pickle: bool = False) -> str:
    return find_model(str(folder), allow_pickle=allow_pickle).fingerprint()


def test_fingerprint_depends_on_every_byte_of_a_weight(tiny: Path) -> None:
    before, path = fingerprint(tiny), tiny / "model.safetensors"
    assert len(before) == 32
    assert int(before, 16)
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time + 1, time + 1))  # a clock may be too coarse to tell the two writes apart
    assert path.stat().st_size == size
    assert fingerprint(tiny) != before


def test_fingerprint_depends_on_the_config(tiny: Path) -> None:
    before = fingerprint(tiny)
    change_config(tiny, rms_norm_eps=1e-3)
    assert fingerprint(tiny) != before


def test_fingerprint_depends_on_content_and_not_on_the_folder(tiny: Path) -> None:
    before = fingerprint(tiny)
    other = tiny.with_name("other")
    shutil.copytree(tiny, other)
    (other / "README.md").write_text("unrelated")
    (other / "model-00001-of-00002.safetensors").write_bytes(b"no index names it")
    torch.save({}, other / "pytorch_model.bin")
    assert fingerprint(other) == fingerprint(other, allow_pickle=True) == before


def test_fingerprint_covers_every_file_of_an_index(tiny: Path) -> None:
    *_, last = as_two_files(tiny)
    before = fingerprint(tiny)
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert fingerprint(tiny) != before


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, real = [], hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        calls.append(1)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return calls


def test_files_are_hashed_once(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_hashes(monkeypatch)
    before = fingerprint(tiny)
    assert fingerprint(tiny) == before
    assert len(calls) == 1
    assert [path.name for path in cache.iterdir()] == ["fingerprints.json"]


BLOCK = 2**20


def weights_file(folder: Path) -> Path:
    """Three MiB, of which only samples are compared at the next use."""
    path = folder / "large"
    path.write_bytes(torch.arange(3 * BLOCK // 8).numpy().tobytes())
    return path


def replace_with_equal_times(path: Path, content: bytes) -> None:
    """Give a file other content, and its old modification time, as `rsync -t` does."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_other_weights_with_equal_size_and_time_have_another_fingerprint(tiny: Path) -> None:
    large = weights_file(tiny)
    before = fingerprint_of_files(tiny / "config.json", [large])
    content = bytearray(large.read_bytes())
    unsampled = 6000  # the first samples are the bytes up to 4096, and from 49866
    content[unsampled] ^= 1
    time.sleep(0.02)  # the clock of a file system may have ticks of 10 ms
    replace_with_equal_times(large, bytes(content))
    assert fingerprint_of_files(tiny / "config.json", [large]) != before


def test_other_weights_have_another_fingerprint_where_times_are_constant(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and Nix set all times to one; network file systems may number files anew."""
    real, inodes = os.fstat, itertools.count()

    def constant(file: int) -> SimpleNamespace:
        size = real(file).st_size
        return SimpleNamespace(st_size=size, st_mtime_ns=1, st_ctime_ns=1, st_ino=next(inodes))

    large = weights_file(tiny)
    monkeypatch.setattr(os, "fstat", constant)
    os.utime(large, ns=(1, 1))
    calls = count_hashes(monkeypatch)
    before = fingerprint_of_files(tiny / "config.json", [large])
    assert fingerprint_of_files(tiny / "config.json", [large]) == before
    assert len(calls) == 1
    weights = torch.frombuffer(bytearray(large.read_bytes()), dtype=torch.bfloat16)
    large.write_bytes((weights * 1.01).view(torch.uint8).numpy().tobytes())  # as if trained for a little longer
    os.utime(large, ns=(1, 1))
    assert fingerprint_of_files(tiny / "config.json", [large]) != before


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 100_000, 64 * 4096])
def test_every_byte_of_a_small_file_is_compared(size: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=size, st_mtime_ns=1, st_ctime_ns=1))
    small = tiny / "small"
    small.write_bytes(bytes(size))
    seen = {fingerprint_of_files(tiny / "config.json", [small])}
    places = sorted({*range(0, size, 5000), *range(max(0, size - 2), size)})
    for place in places:
        small.write_bytes(bytes(place) + b"1" + bytes(size - place - 1))
        seen.add(fingerprint_of_files(tiny / "config.json", [small]))
    assert len(seen) == len(places) + 1


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000, "short entries"])
def test_damaged_cache_is_rebuilt(tiny: Path, cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(tiny)
    stored = cache / "fingerprints.json"
    entries = {path: [1] for path in json.loads(stored.read_text())}
    stored.write_bytes((json.dumps(entries) if text == "short entries" else text).encode("latin-1"))
    calls = count_hashes(monkeypatch)
    assert fingerprint(tiny) == fingerprint(tiny) == before
    assert len(calls) == 1


def test_fingerprint_where_no_cache_can_be_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(tiny)
    monkeypatch.setenv("MLPRUNE_CACHE", str(tiny / "config.json"))  # a file: no folder can be made there
    assert fingerprint(tiny) == before


# the hub


def http(kind: Callable[..., Exception]) -> Exception:
    return kind("two\nlines", response=SimpleNamespace(headers={}, request=None))


HUB_FAILURES = [
    (http(errors.RepositoryNotFoundError), "no such model on the hub"),
    (http(errors.GatedRepoError), "request access at https://huggingface.co/some/model"),
    (http(errors.RevisionNotFoundError), "no revision v9"),
    (http(errors.HfHubHTTPError), "cannot be fetched from the hub (two lines)"),
    (errors.LocalEntryNotFoundError("far\naway"), "unreachable"),
    (errors.OfflineModeIsEnabled("off"), "unreachable"),
    (OSError(28, "No space left on device"), "No space left on device"),
]


@pytest.mark.parametrize(("failure", "words"), HUB_FAILURES, ids=lambda value: type(value).__name__)
def test_hub_failure_is_one_line(failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("some/model", words, revision="v9")


def test_name_that_is_not_a_model_id() -> None:
    refused("not a model", "not a Hugging Face model id (owner/name)")  # without a request to the hub


def fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let `snapshot_download` return `folder`; return the list of its calls."""
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_hub_model_is_fetched_without_code_or_pickles(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(tiny, monkeypatch)
    source = find_model("some/model", revision="v1", allow_pickle=True)
    assert source == ModelSource("some/model", tiny, trust_remote_code=False, allow_pickle=True, commit=tiny.name)
    (call,) = calls  # there are safetensors: pickles are not fetched even where they are allowed
    assert (call["name"], call["revision"]) == ("some/model", "v1")
    assert not {"*.py", "*.bin", "pytorch_model*.bin"} & set(call["allow_patterns"])
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(call["allow_patterns"])


def test_hub_files_follow_what_is_allowed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(tiny, monkeypatch)
    find_model("some/model", weights=False, trust_remote_code=True)
    assert "*.py" in calls[0]["allow_patterns"]
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    as_pickle(tiny)
    find_model("some/model", allow_pickle=True)
    assert "pytorch_model*.bin" in calls[-1]["allow_patterns"]
