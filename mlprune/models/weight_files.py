"""Finds the files that hold a checkpoint's weights, and checks that they are complete.

The search order is that of transformers: `model.safetensors`, else its index, else `pytorch_model.bin`, else its
index. The last two are read only if the user trusts the model, because a pickle can carry code. Weights are not
loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlprune.errors import MlpruneError, ModelError
from mlprune.storage.files import DAMAGED_JSON

SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def find_weight_files(name: str, folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the files in `folder` that hold the weights of model `name`, in order of file name.

    Raises ModelError if there are none, if one is absent or cut off, or if they are pickles and not allowed.
    """
    candidates = (*SAFE_WEIGHTS, *PICKLED_WEIGHTS) if allow_pickle else SAFE_WEIGHTS
    path = next((folder / file for file in candidates if (folder / file).is_file()), None)
    if path is None:
        raise _no_weights(name, folder, allow_pickle)
    files = _files_of_index(name, path) if path.suffix == ".json" else [path]
    for file in files:
        if file.suffix == ".safetensors" and not _is_complete(file):
            raise ModelError("model.path", name, f"{file.name} is not a whole safetensors file: fetch it again")
    return files


def unreadable(name: str, what: str, error: Exception) -> ModelError:
    """Return the ModelError for a part of model `name` that cannot be read."""
    return ModelError("model.path", name, f"its {what} cannot be read ({one_line(error)})")


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Turn every error of the block into a ModelError; those of transformers and safetensors share no class."""
    try:
        yield
    except MlpruneError:
        raise
    except Exception as error:
        raise unreadable(name, what, error) from error


def one_line(error: Exception) -> str:
    """Return the error's message as one line of at most 200 characters; its class if it has no message."""
    if isinstance(error, KeyError):  # its message is the key alone
        return f"there is no {error}"[:200]
    return " ".join(str(error).split())[:200] or type(error).__name__


def no_checkpoint(name: str, folder: Path, remedy: str) -> ModelError:
    """Return the ModelError for a folder without a file that it needs: `remedy`, unless its weights are GGUF."""
    if any(folder.glob("*.gguf")):
        remedy = "its weights are GGUF: convert them with transformers (docs/spec.md, The model)"
    return ModelError("model.path", name, remedy)


def _no_weights(name: str, folder: Path, allow_pickle: bool) -> ModelError:
    if not allow_pickle and any((folder / file).is_file() for file in PICKLED_WEIGHTS):
        remedy = "its weights are pickled, and a pickle can carry code: convert it to safetensors, or set "
        return ModelError("model.path", name, remedy + "model.allow_pickle=true if you trust it")
    wanted = " or ".join(PICKLED_WEIGHTS if allow_pickle else SAFE_WEIGHTS)
    hint = "" if allow_pickle else " (pickled weights are read only with model.allow_pickle=true)"
    return no_checkpoint(name, folder, f"no weights in {folder}: looked for {wanted}{hint}")


def _files_of_index(name: str, index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_bytes())
        files = sorted({str(file) for file in content["weight_map"].values()})
        absent = [file for file in files if not (index.parent / file).is_file()]
        has_metadata = isinstance(content.get("metadata"), dict)
    except (OSError, *DAMAGED_JSON) as error:
        raise unreadable(name, index.name, error) from error
    remedy = ""
    if not files:
        remedy = "names no file"
    elif index.name in SAFE_WEIGHTS and not all(file.endswith(".safetensors") for file in files):
        remedy = "names files that are not safetensors"
    elif absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        remedy = f"names {absent[0]}{more}, not in {index.parent}"
    elif not has_metadata:  # transformers requires it
        remedy = 'has no "metadata"'
    if remedy:
        raise ModelError("model.path", name, f"{index.name} {remedy}: fetch it again")
    return [index.parent / file for file in files]


def _is_complete(file: Path) -> bool:
    """Compare the file's size with the size that its safetensors header states: a download may have been cut."""
    try:
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(header_bytes, file.stat().st_size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(file.stat().st_size == 8 + header_bytes + max(ends, default=0))
    except (OSError, IndexError, *DAMAGED_JSON):
        return False
