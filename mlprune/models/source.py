"""Any model, as the user names it, to a local folder that is checked before a weight is loaded.

A name is `demo`, a folder, or a Hugging Face hub id. Whatever it is, the outcome is a folder with config,
weights and tokenizer, and a fingerprint of its content by which moments and masks are stored.

Weights are found as transformers finds them: `model.safetensors`, else its index, else `pytorch_model.bin`,
else its index; the last two only if the user trusts the model, because a pickle can carry code.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from mlprune.errors import ModelError
from mlprune.models.demo import Progress, cache_folder, demo_folder
from mlprune.storage.files import write_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model")
# a second copy of the weights in its maker's own format, and everything in subfolders (onnx/, original/)
HUB_IGNORED = ("consolidated*", "*/*")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, and what the user allows in reading it."""

    name: str  # as the user wrote it: demo, a hub id, a folder
    folder: Path  # where config, weights and tokenizer lie; a config file alone, where no more is needed
    trust_remote_code: bool
    allow_pickle: bool
    commit: str | None = None  # of a hub model

    def on_this_node(self) -> "ModelSource":
        """The same model on this machine, which may not be the one that found it."""
        if self.folder.exists():
            return self
        if self.name == "demo":
            return replace(self, folder=demo_folder(None))
        if self.commit is None:
            remedy = f"{self.folder} is not on {platform.node()}: put it on a shared disk, or there on every node"
            raise ModelError("model.path", self.name, remedy)
        extra = ("*.py",) if self.trust_remote_code else ()
        fetched = _fetch(self.name, self.commit, extra, weights=True, allow_pickle=self.allow_pickle)
        return replace(self, folder=fetched)

    @property
    def config_file(self) -> Path:
        return self.folder if self.folder.is_file() else self.folder / "config.json"

    def config(self) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # a config class, perhaps the model's own code, may raise anything
            raise self._unreadable("config.json", error) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # as above
            raise self._unreadable("tokenizer", error) from error

    def dtype(self, asked: str) -> torch.dtype:
        """The dtype asked for; `auto` is the checkpoint's own."""
        if asked in DTYPES:
            return DTYPES[asked]
        if asked != "auto":
            raise ModelError("model.dtype", asked, f"write auto, {', '.join(DTYPES)}")
        config = self.config()
        own = config.get_text_config().dtype or config.dtype or torch.float32
        dtype: torch.dtype = getattr(torch, own) if isinstance(own, str) else own
        return dtype

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in order of name; an error if one is absent."""
        for name in (*SAFE_WEIGHTS, *(PICKLED_WEIGHTS if self.allow_pickle else ())):
            path = self.folder / name
            if path.is_file():
                files = self._files_of_index(path) if name.endswith(".json") else [path]
                for file in files:
                    self._check_whole(file)
                return files
        if any((self.folder / name).is_file() for name in PICKLED_WEIGHTS):
            remedy = "its weights are pickled, and a pickle can carry code: convert it to safetensors, or set "
            raise self._error(remedy + "model.allow_pickle=true if you trust it")
        wanted = " or ".join(PICKLED_WEIGHTS if self.allow_pickle else SAFE_WEIGHTS)
        hint = "" if self.allow_pickle else " (pickled weights are read only with model.allow_pickle=true)"
        raise self._error(f"no weights in {self.folder}: looked for {wanted}{hint}")

    def fingerprint(self) -> str:
        """32 hex digits of the content: config, weights and, where it is trusted, the model's own code."""
        digest = hashlib.sha256(self.config_file.read_bytes())
        code = sorted(self.folder.glob("*.py")) if self.trust_remote_code else []
        files = [*self.weight_files(), *code]
        for path, content in zip(files, _file_hashes(files), strict=True):
            digest.update(f"{path.name}\0{path.stat().st_size}\0{content}\n".encode())
        return digest.hexdigest()[:32]

    def _files_of_index(self, index: Path) -> list[Path]:
        try:
            names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(index.name, error) from error
        if not names:
            raise self._error(f"{index.name} names no file: fetch it again")
        if index.name in SAFE_WEIGHTS and not all(name.endswith(".safetensors") for name in names):
            raise self._error(f"{index.name} names files that are no safetensors: fetch it again")
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise self._error(f"{index.name} names {absent[0]}{more}, not in {self.folder}: fetch it again")
        return [self.folder / name for name in names]

    def _check_whole(self, file: Path) -> None:
        """A safetensors file says in its header how long it is: an interrupted download is known by that."""
        if file.suffix != ".safetensors":
            return
        try:
            with file.open("rb") as opened:
                header_bytes = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(header_bytes, file.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = file.stat().st_size == 8 + header_bytes + max(ends, default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            whole = False
        if not whole:
            raise self._error(f"{file.name} is not a whole safetensors file: fetch it again")

    def _error(self, remedy: str) -> ModelError:
        return ModelError("model.path", self.name, remedy)

    def _unreadable(self, what: str, error: Exception) -> ModelError:
        return self._error(f"its {what} cannot be read ({_one_line(error)})")


def find_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    progress: Progress | None = None,
) -> ModelSource:
    """Find the model, fetch it if need be, and check all that can be checked without loading a weight."""
    folder = Path(name) if _is_config(name) and not weights else _folder_of(name, progress)
    if folder is not None and revision is not None:
        raise ModelError("model.revision", revision, f"only a hub id has revisions, and {name} is none")
    commit = None
    if folder is None:
        extra = ("*.py",) if trust_remote_code else ()
        folder = _fetch(name, revision, extra, weights=weights, allow_pickle=allow_pickle)
        commit = folder.name
    source = ModelSource(name, folder, trust_remote_code, allow_pickle, commit)
    _check_config(source)
    _check_attention(source)
    if weights:
        source.weight_files()
    return source


def _is_config(name: str) -> bool:
    return name.endswith(".json") and os.path.isfile(name)  # noqa: PTH113 - a Path refuses some names


def _folder_of(name: str, progress: Progress | None) -> Path | None:
    """The folder that a name stands for; None if only the hub can know it."""
    if name == "demo":
        return demo_folder(progress)
    if not name.strip():
        raise ModelError("model.path", repr(name), "name a folder, a hub id, or demo")
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # ~somebody unknown: no such folder, said below
        path = path.expanduser()
    if path.is_dir():
        return path.absolute()  # workers and trials run in folders of their own
    if path.is_file():
        raise ModelError("model.path", name, "a file: name the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("model.path", name, "no such folder")
    return None


def _fetch(name: str, revision: str | None, extra: Sequence[str], *, weights: bool, allow_pickle: bool) -> Path:
    """The hub's files for a model; pickled weights only where there are no others."""
    patterns = [*HUB_FILES, *extra]
    folder = _snapshot(name, revision, [*patterns, *(["*.safetensors"] if weights else [])])
    if weights and allow_pickle and not any((folder / file).is_file() for file in SAFE_WEIGHTS):
        return _snapshot(name, revision, [*patterns, "pytorch_model*.bin"])
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    ignored = list(HUB_IGNORED)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # the hub's, the network's and the disk's failures share no class
        raise ModelError("model.path", name, _hub_remedy(error, name, revision)) from error


def _hub_remedy(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "no such folder, and no hub id (owner/name) either"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: ask for access at https://huggingface.co/{name}, then log in (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the hub; if it is private, log in (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision} of it: check model.revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "no such folder, not in the hub's local cache, and the hub is out of reach: check the network"
    return f"cannot be fetched from the hub ({_one_line(error)})"


def _check_config(source: ModelSource) -> None:
    """The config is there, well formed, and of a causal language model that may be run."""
    path = source.config_file
    if not path.is_file():
        raise source._error(f"no config.json in {source.folder}: name a Hugging Face model's folder")
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise source._unreadable("config.json", error) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise source._error("its config.json names no model_type: name a Hugging Face model's folder")
    own_code = bool(raw.get("auto_map"))
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        _check_unknown_type(source, raw["model_type"], own_code)
    if own_code and source.trust_remote_code:
        source.config()
    elif source.config_file.with_name("adapter_config.json").is_file():
        raise source._error("holds an adapter, for which another model would be loaded: merge it into its model")
    elif type(source.config()) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise source._error(f"a {raw['model_type']} is not a causal language model: name one that is")


def _check_attention(source: ModelSource) -> None:
    """A name with a slash is that of a kernel on the hub: code."""
    config = source.config()
    for part in (config, config.get_text_config()):
        if "/" in str(part._attn_implementation) and not source.trust_remote_code:
            remedy = f"its attention is code of the hub ({part._attn_implementation}): set "
            raise source._error(remedy + "model.trust_remote_code=true if you trust it")


def _check_unknown_type(source: ModelSource, model_type: object, own_code: bool) -> None:
    if not own_code:
        version = transformers.__version__
        raise source._error(f"transformers {version} does not know model_type {model_type!r}: upgrade it")
    if not source.trust_remote_code:
        raise source._error("it runs code of its own: set model.trust_remote_code=true if you trust it")


def _file_hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, from the cache where path, size and time of change are as they were."""
    known = _known_hashes()
    hashes, news = [], {}
    for path in files:
        status = path.stat()
        state: list[object] = [status.st_size, status.st_mtime_ns]
        key = str(path.resolve())
        entry = known.get(key)
        if not (isinstance(entry, list) and entry[:2] == state and len(entry) == 3):
            with path.open("rb") as file:
                entry = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            news[key] = entry
        hashes.append(str(entry[2]))
    if news:
        _cache_hashes({**known, **news})
    return hashes


def _known_hashes() -> dict[str, Any]:
    try:
        known = json.loads((cache_folder() / "fingerprints.json").read_bytes())
    except (OSError, ValueError):  # absent or damaged: the hashes are computed again
        return {}
    return known if isinstance(known, dict) else {}


def _cache_hashes(hashes: dict[str, Any]) -> None:
    """Write the cache whole. Of two concurrent writers one wins; the other's hashes are computed again."""
    with contextlib.suppress(OSError):  # without a writable cache, hashing is slow and still correct
        write_whole(cache_folder() / "fingerprints.json", json.dumps(hashes).encode())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
