"""Downloads a model's files from the Hugging Face hub into its local cache, and words the hub's errors.

What the files contain is checked in `source`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mlprune.errors import ModelError
from mlprune.models.weight_files import SAFE_WEIGHTS, one_line

CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model")
# a second copy of the weights in its maker's own format, and everything in subfolders (onnx/, original/)
IGNORED_FILES = ("consolidated*", "*/*")

logger = logging.getLogger(__name__)


def fetch_from_hub(name: str, revision: str | None, *, code: bool, weights: bool, allow_pickle: bool) -> Path:
    """Return the local folder of a hub model; download what the cache lacks.

    `code`: the model's own Python files too. Pickled weights are downloaded only if they are allowed and there are
    no safetensors. The folder's name is the commit. Raises ModelError.
    """
    patterns = [*CONFIG_FILES, *(["*.py"] if code else [])]
    folder = _download(name, revision, [*patterns, *(["*.safetensors"] if weights else [])])
    if weights and allow_pickle and not any((folder / file).is_file() for file in SAFE_WEIGHTS):
        logger.debug("%s has no safetensors on the hub: fetching its pickled weights", name)
        return _download(name, revision, [*patterns, "pytorch_model*.bin"])
    return folder


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    ignored = list(IGNORED_FILES)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # the errors of hub, network and disk share no base class
        raise ModelError("model.path", name, _remedy(error, name, revision)) from error


def _remedy(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "no such folder, and not a Hugging Face model id (owner/name) either"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: request access at https://huggingface.co/{name}, then log in (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the hub; if it is private, log in (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision} of it: check model.revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "no such folder, not in the hub's local cache, and the hub is unreachable: check the network"
    return f"cannot be fetched from the hub ({one_line(error)})"
