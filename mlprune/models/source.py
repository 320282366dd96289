"""Resolves a model's name to a local folder, and checks it before a weight is loaded.

A name is `demo`, a folder, or a Hugging Face model id. In each case the result is a `ModelSource`: a folder with
config, weights and tokenizer, and a fingerprint of its content by which moments and masks are stored. The demo
model is built in `demo`, downloads are in `hub`, the weights' files are checked in `weight_files`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from mlprune.errors import ModelError
from mlprune.models.config_check import check_raw, check_values
from mlprune.models.demo import Progress, demo_folder
from mlprune.models.fingerprint import fingerprint
from mlprune.models.hub import fetch_from_hub
from mlprune.models.weight_files import find_weight_files, no_checkpoint, readable, unreadable
from mlprune.storage.files import DAMAGED_JSON

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, and what the user allows when it is read."""

    name: str  # as the user wrote it: demo, a Hugging Face model id or a folder
    folder: Path  # holds config, weights and tokenizer; a config file alone, where no more is needed
    trust_remote_code: bool
    allow_pickle: bool
    commit: str | None = None  # of a hub model

    def on_this_node(self) -> ModelSource:
        """Return the same model with a folder on this node; it may have been resolved on another one.

        Raises ModelError if the folder is not on this node and the model cannot be fetched.
        """
        if self.folder.exists():
            return self
        if self.name == "demo":
            return replace(self, folder=demo_folder(None))
        if self.commit is None:
            remedy = f"{self.folder} is not on {platform.node()}: put it on a shared disk, or there on every node"
            raise ModelError("model.path", self.name, remedy)
        code, allow_pickle = self.trust_remote_code, self.allow_pickle
        folder = fetch_from_hub(self.name, self.commit, code=code, weights=True, allow_pickle=allow_pickle)
        return replace(self, folder=folder)

    @property
    def config_file(self) -> Path:
        """Return the path of the model's config.json."""
        return self.folder if self.folder.is_file() else self.folder / "config.json"

    def config(self) -> PretrainedConfig:
        """Read the configuration. Raises ModelError."""
        with readable(self.name, "config.json"):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, and try it. Raises ModelError."""
        with readable(self.name, "tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
            if not tokenizer("a b", add_special_tokens=False).input_ids:
                raise _error(self, "its tokenizer makes no tokens: fetch its files again")
            return tokenizer

    def dtype(self, requested: str) -> torch.dtype:
        """Return the requested dtype; `auto` is the config's own. Raises ModelError for another name."""
        if requested in DTYPES:
            return DTYPES[requested]
        if requested != "auto":
            raise ModelError("model.dtype", requested, f"write auto, {', '.join(DTYPES)}")
        config = self.config()
        own = config.get_text_config().dtype or config.dtype or torch.float32
        if str(own).removeprefix("torch.") not in DTYPES:
            raise ModelError("model.dtype", requested, f"its config.json has {own}: write {', '.join(DTYPES)}")
        return DTYPES[str(own).removeprefix("torch.")]

    def weight_files(self) -> list[Path]:
        """Return the files that hold the weights, in order of name. Raises ModelError if one is absent."""
        return find_weight_files(self.name, self.folder, self.allow_pickle)

    def fingerprint(self) -> str:
        """Return 32 hex digits of the content: config, weights and, if it is trusted, the model's own code."""
        code = sorted(self.folder.glob("*.py")) if self.trust_remote_code else []
        return fingerprint(self.config_file, [*self.weight_files(), *code])


def find_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    progress: Progress | None = None,
) -> ModelSource:
    """Resolve the model's name, fetch the model if necessary, and check it without loading a weight.

    `weights` False: only the config is needed, and `name` may be that of a config file. Raises ModelError.
    """
    folder = Path(name) if not weights and _is_config_file(name) else _local_folder(name, progress)
    if folder is not None and revision is not None:
        remedy = f"only a Hugging Face model id has revisions, and {name} is not one"
        raise ModelError("model.revision", revision, remedy)
    commit = None
    if folder is None:
        folder = fetch_from_hub(name, revision, code=trust_remote_code, weights=weights, allow_pickle=allow_pickle)
        commit = folder.name
    source = ModelSource(name, folder, trust_remote_code, allow_pickle, commit)
    _check_config(source)
    check_values(source.config(), name, trust_remote_code)
    if weights:
        source.weight_files()
        _check_generation_config(source)
    return source


def _is_config_file(name: str) -> bool:
    return name.endswith(".json") and os.path.isfile(name)  # noqa: PTH113 - a Path refuses some names


def _local_folder(name: str, progress: Progress | None) -> Path | None:
    """Return the folder that a name stands for; None if it can only be a Hugging Face model id."""
    if name == "demo":
        return demo_folder(progress)
    if not name.strip():
        raise ModelError("model.path", repr(name), "name a folder, a Hugging Face model id, or demo")
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # the ~user does not exist: reported as "no such folder" below
        path = path.expanduser()
    if path.is_dir():
        return path.absolute()  # workers and trials run in other working directories
    if path.is_file():
        raise ModelError("model.path", name, "a file: name the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("model.path", name, "no such folder")
    return None


def _check_config(source: ModelSource) -> None:
    """Check that the config exists, is well formed, and describes a causal language model that may be run."""
    path = source.config_file
    if not path.is_file():
        remedy = f"no config.json in {source.folder}: name a Hugging Face model's folder"
        raise no_checkpoint(source.name, source.folder, remedy)
    raw = _read_json(source, path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise _error(source, "its config.json names no model_type: name a Hugging Face model's folder")
    check_raw(raw, source.name)
    own_code = bool(raw.get("auto_map"))
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        _check_unknown_type(source, raw["model_type"], own_code)
    if own_code and source.trust_remote_code:
        source.config()
    elif path.with_name("adapter_config.json").is_file():
        raise _error(source, "holds an adapter, for which another model would be loaded: merge it into its model")
    elif type(source.config()) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _error(source, f"a {raw['model_type']} is not a causal language model: name one that is")


def _read_json(source: ModelSource, path: Path) -> object:
    try:
        value: object = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, *DAMAGED_JSON) as error:
        raise unreadable(source.name, path.name, error) from error
    return value


def _check_generation_config(source: ModelSource) -> None:
    """Check a file that transformers reads with the weights, though generation here does not use it."""
    path = source.folder / "generation_config.json"
    if path.exists() and not isinstance(_read_json(source, path), dict):
        raise _error(source, f"its {path.name} holds no object: fetch it again")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _check_unknown_type(source: ModelSource, model_type: str, own_code: bool) -> None:
    if not own_code:
        version = transformers.__version__
        raise _error(source, f"transformers {version} does not know model_type {model_type!r}: upgrade it")
    if not source.trust_remote_code:
        raise _error(source, "it runs code of its own: set model.trust_remote_code=true if you trust it")


def _error(source: ModelSource, remedy: str) -> ModelError:
    return ModelError("model.path", source.name, remedy)
