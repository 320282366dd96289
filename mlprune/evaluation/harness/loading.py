"""Finds tasks of lm-evaluation-harness, checks that they can be used, and makes their requests.

A task whose metrics are all of a whole set is refused (see `task` for the metrics that are kept).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mlprune.data.special_tokens import pad_id
from mlprune.errors import SpecError
from mlprune.evaluation.harness.encoder import Encoder
from mlprune.evaluation.harness.isolation import seeded_and_silent
from mlprune.evaluation.harness.requests import GenerationRequest, LikelihoodRequest, Requests
from mlprune.evaluation.harness.task import KEPT_AGGREGATIONS, Harness

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.tasks"
SAMPLES = Path(__file__).parents[1] / "tasks"
# The attributes of a loaded task from which its requests are made. They are large, and read from files that
# another machine may not have.
_SOURCES = ("dataset", "task_docs", "sampler", "_training_docs", "_fewshot_docs")


def build_harness(
    names: Sequence[str],
    path: str | None,
    items: int | None,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Harness:
    """Load the first `items` documents (None: all) of each task, group or tag: of the harness, `path` or SAMPLES.

    `path`: a folder of the user's own tasks, which take precedence over others of the same name. `positions`: the
    longest row that the model accepts, in tokens. Raises SpecError for a task that is unknown, whose data cannot
    be loaded or do not match it, that has no metric that is a mean over documents, or whose requests are not
    supported.
    """
    encoder = Encoder(tokenizer, positions)
    with seeded_and_silent():
        manager = task_manager(names, path)
        tasks: dict[str, tuple[str, Task]] = {}  # task name -> spec key of the name that includes it, and the task
        for n, name in enumerate(names):
            for task in load_tasks(manager, name, f"{KEY}[{n}]"):
                tasks.setdefault(task.task_name, (f"{KEY}[{n}]", task))
        encoded: list[LikelihoodRequest | GenerationRequest] = []
        for key, task in tasks.values():
            encoded += _make_requests(task, items, encoder, key)
    requests = Requests.build(encoded, pad_id(tokenizer), pad_free)
    loaded = tuple(task for _, task in tasks.values())
    content = [lm_eval.__version__, requests.key, [_content(task) for task in loaded]]
    key = hashlib.sha256(json.dumps(content, default=_as_text).encode()).hexdigest()[:32]
    return Harness(tuple(tasks), key, requests, loaded)


def task_manager(names: Sequence[str], path: str | None) -> TaskManager:
    """Index the tasks. The harness's own 14,000 are indexed only if a name needs it, since that takes seconds."""
    if path is not None and not Path(path).is_dir():
        raise SpecError("evaluation.task_path", repr(path), "no such folder; name one with task YAML files")
    folders = [SAMPLES, *([Path(path)] if path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_is_complete(manager, name) for name in names):
        manager = TaskManager(include_path=folders)
    for entry in manager.task_index.values():
        if entry.yaml_path and entry.yaml_path.parent == SAMPLES:
            # the samples name their data files relative to their folder; the harness would not find them
            config = load_yaml(entry.yaml_path)
            files = config["dataset_kwargs"]["data_files"]
            files.update({split: str(SAMPLES / name) for split, name in files.items()})
            entry.cfg, entry.yaml_path = config, None
    return manager


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Return whether the index has the name and, if it is a group, all its members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task", ())
    return isinstance(members, str) or all(
        isinstance(member, str) and _is_complete(manager, member) for member in members
    )


def load_tasks(manager: TaskManager, name: str, key: str) -> list[Task]:
    """Load the tasks of a name (a task, group or tag) with their data. Raises SpecError, naming `key`."""
    if name not in manager.task_index:
        similar = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "none"
        remedy = f"no such task in lm-evaluation-harness or evaluation.task_path; similar names: {similar}"
        raise SpecError(key, repr(name), remedy)
    try:
        tasks = list(manager.load([name])["tasks"].values())
    except Exception as error:  # from the hub, the network, the disk, a YAML file or a task's own code
        remedy = "without network access, define a task with local files under evaluation.task_path"
        raise SpecError(key, repr(name), f"cannot be loaded ({_one_line(error)}); {remedy}") from error
    for module in [module for module in sys.modules if module.startswith("/")]:
        # code beside a YAML file: once it is no module, it is pickled by value, as no other process can import it
        del sys.modules[module]
    for task in tasks:
        _check(task, key)
    return tasks


def _check(task: Task, key: str) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise SpecError(key, repr(task.task_name), "runs code that the model writes; choose another task")
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(key, repr(task.task_name), "needs images or sound; choose a task of text alone")
    if not any(aggregation in KEPT_AGGREGATIONS for aggregation in task.aggregation().values()):
        remedy = f"its metrics ({', '.join(task.aggregation())}) are of a whole set, not means over items; choose "
        raise SpecError(key, repr(task.task_name), remedy + "a task with such a mean, e.g. acc or exact_match")


def _make_requests(
    task: Task, items: int | None, encoder: Encoder, key: str
) -> list[LikelihoodRequest | GenerationRequest]:
    """Make the task's requests, which stay in the task, and return them as tokens. Their sources are released."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        task.build_all_requests(limit=items)
    except Exception as error:  # from a task's own code and templates, on documents that they do not expect
        remedy = f"its documents do not match it ({_one_line(error)}); correct them, or choose another task"
        raise SpecError(key, repr(task.task_name), remedy) from error
    try:
        encoded = [encoder.encode(instance) for instance in task.instances]
    except ValueError as error:
        raise SpecError(key, repr(task.task_name), f"needs {error}; choose another task") from error
    for name in _SOURCES:
        if hasattr(task, name):
            setattr(task, name, None)
    return encoded


def _content(task: Task) -> list[object]:
    """Return what a task's numbers depend on, beside the model and how requests are tokenised."""
    names = ("num_fewshot", "metric_list", "filter_list", "repeats")
    settings = [task.task_name, task.VERSION, *(task.get_config(name) for name in names)]
    return [settings, [[instance.doc_id, instance.doc, instance.args] for instance in task.instances]]


def _as_text(value: object) -> str:
    """Return what JSON cannot hold as text: a function's name, or the text of anything else."""
    return str(getattr(value, "__qualname__", value))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
