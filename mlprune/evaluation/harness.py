"""Tasks of lm-evaluation-harness (EleutherAI), asked of a sharded, masked model.

Documents, prompts, few-shot examples, filters and metrics are the harness's own. Its loop over them is not used:
requests are made once for all variants, and their likelihoods come from one pass through the model.

A metric is kept item by item, so only what is a mean over items is taken: acc, acc_norm, exact_match, ... A
task's metrics of a whole set (F1, BLEU) are left out, and a task that has no other is refused. Of a task that asks
for the likelihood of documents it is bits per byte; its mean over documents is not the harness's number, which
weighs them by length.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import logging
import math
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
from lm_eval.api.metrics import bits_per_byte, mean
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mlprune.data.calibration import pad_id
from mlprune.errors import SpecError
from mlprune.evaluation.harness_model import Encoder, Requests
from mlprune.evaluation.items import Items
from mlprune.shards.decoding import kept_at_once
from mlprune.shards.pipeline import Pipeline, Progress
from mlprune.spec.languages import language_name

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

KEY = "evaluation.tasks"
SAMPLES = Path(__file__).parent / "tasks"
# of a loaded task, what requests are made from: much of it, and read from files that another machine may not have
_SOURCES = ("dataset", "task_docs", "sampler", "_training_docs", "_fewshot_docs")


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of lm-evaluation-harness, loaded and checked. Pickled, it needs no file of theirs."""

    tasks: tuple[str, ...]  # names, groups taken apart
    key: str  # a content hash of documents, requests, their tokens and the harness's version
    requests: Requests
    _loaded: tuple[Task, ...]  # with their requests, in the same order

    @property
    def tokens(self) -> int:
        """Of all requests, pads included."""
        return self.requests.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row, or prompt with what is written after it."""
        return self.requests.longest

    @property
    def written(self) -> int:
        """Tokens of the rows written at the same time, their prompts included; 0 if nothing is written."""
        return kept_at_once(len(self.requests.written), self.requests.cached)

    def ask(self, pipeline: Pipeline, variant: str | None, progress: Progress | None = None) -> list[Items]:
        """What the dense model (`variant` None), or a variant, answers: each task's metrics, by document."""
        answers = iter(self.requests.answers(pipeline, variant, progress))
        items = []
        with _as_the_harness_runs():
            for loaded in self._loaded:
                task = copy.copy(loaded)
                task._instances = [
                    replace(asked, resps=[next(answers)] * asked.repeats, filtered_resps={})
                    for asked in loaded.instances
                ]
                task.apply_filters()
                items += _items(task)
        return items


def harness(
    names: Sequence[str],
    path: str | None,
    items: int | None,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    pad_free: bool,
) -> Harness:
    """The first `items` documents (None: all) of each task, group or tag of the harness, of `path`, or of SAMPLES.

    `path`: a folder of tasks of the user's own, which go before others of the same name. `positions`: tokens that
    the model takes at most. Raises SpecError for a task that is unknown, whose data cannot be had or do not fit
    it, that has no metric that is a mean over items, or that asks for what this model cannot be asked.
    """
    encoder = Encoder(tokenizer, positions)
    with _as_the_harness_runs():
        manager = _manager(names, path)
        tasks: dict[str, tuple[str, Task]] = {}  # and the key of the name that it comes from
        for n, name in enumerate(names):
            for task in _load(manager, name, f"{KEY}[{n}]"):
                tasks.setdefault(task.task_name, (f"{KEY}[{n}]", task))
        asked: list[Any] = []
        for key, task in tasks.values():
            asked += _requests(task, items, encoder, key)
    requests = Requests.of(asked, pad_id(tokenizer), pad_free)
    loaded = tuple(task for _, task in tasks.values())
    content = [lm_eval.__version__, requests.key, [_content(task) for task in loaded]]
    key = hashlib.sha256(json.dumps(content, default=_plain).encode()).hexdigest()[:32]
    return Harness(tuple(tasks), key, requests, loaded)


def _manager(names: Sequence[str], path: str | None) -> TaskManager:
    """An index of tasks: of the harness's own 14,000 only if need be, since that takes seconds."""
    if path is not None and not Path(path).is_dir():
        raise SpecError("evaluation.task_path", repr(path), "no such folder; name one with task YAML files")
    folders = [SAMPLES, *([Path(path)] if path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_is_whole(manager, name) for name in names):
        manager = TaskManager(include_path=folders)
    for entry in manager.task_index.values():
        if entry.yaml_path and entry.yaml_path.parent == SAMPLES:
            config = load_yaml(entry.yaml_path)
            files = config["dataset_kwargs"]["data_files"]
            files.update({split: str(SAMPLES / name) for split, name in files.items()})
            entry.cfg, entry.yaml_path = config, None
    return manager


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether the index has it, and all that is in it if it is a group."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task", ())
    return isinstance(members, str) or all(isinstance(one, str) and _is_whole(manager, one) for one in members)


def _load(manager: TaskManager, name: str, key: str) -> list[Task]:
    """The tasks that a name stands for, each with its data."""
    if name not in manager.task_index:
        close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "none"
        remedy = f"no such task in lm-evaluation-harness or evaluation.task_path; names like it: {close}"
        raise SpecError(key, repr(name), remedy)
    try:
        tasks = list(manager.load([name])["tasks"].values())
    except Exception as error:  # of the hub, the network, the disk, a YAML file or a task's own code
        remedy = "without a network give local files, by a task of your own under evaluation.task_path"
        raise SpecError(key, repr(name), f"cannot be loaded ({_one_line(error)}); {remedy}") from error
    for module in [module for module in sys.modules if module.startswith("/")]:
        del sys.modules[module]  # code beside a YAML file: pickled by value, as no other process can import it
    for task in tasks:
        _check(task, key)
    return tasks


def _check(task: Task, key: str) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise SpecError(key, repr(task.task_name), "runs code that the model writes; choose another task")
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(key, repr(task.task_name), "asks about images or sound; choose a task of text")
    if not any(taken in (mean, bits_per_byte) for taken in task.aggregation().values()):
        remedy = f"its metrics ({', '.join(task.aggregation())}) are of a whole set, not means over items; choose "
        raise SpecError(key, repr(task.task_name), remedy + "a task with one that is, as acc or exact_match")


def _requests(task: Task, items: int | None, encoder: Encoder, key: str) -> list[Any]:
    """Make the task's requests, which stay in it; the same as tokens. What they were made from goes."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        task.build_all_requests(limit=items)
    except Exception as error:  # a task's own code and templates, on documents that are not as they should be
        remedy = f"its documents do not fit it ({_one_line(error)}); mend them, or choose another task"
        raise SpecError(key, repr(task.task_name), remedy) from error
    try:
        asked = [getattr(encoder, request.request_type)([request])[0] for request in task.instances]
    except ValueError as error:
        raise SpecError(key, repr(task.task_name), f"asks for {error}") from error
    for name in _SOURCES:
        if hasattr(task, name):
            setattr(task, name, None)
    return asked


def _items(task: Task) -> list[Items]:
    """The metrics of an answered task, each with the documents that have it."""
    of_document: dict[int, list[Instance]] = {}
    for asked in task.instances:
        of_document.setdefault(asked.doc_id, []).append(asked)
    filters = list(task.instances[0].filtered_resps)
    found: dict[str, dict[str, float]] = {}
    for number, asked in of_document.items():
        for chosen in filters:
            responses = [one.filtered_resps[chosen] for one in sorted(asked, key=lambda one: one.idx)]
            for metric, value in _values(task, task.process_results(asked[0].doc, responses)).items():
                name = metric if len(filters) == 1 else f"{metric}.{chosen}"
                found.setdefault(name, {})[str(number)] = value
    return [
        Items(
            task.task_name,
            _language(task.task_name),
            "value",
            ids=tuple(values),
            columns={"value": tuple(values.values())},
            metric=metric,
        )
        for metric, values in found.items()
    ]


def _values(task: Task, results: Mapping[str, Any]) -> dict[str, float]:
    """Of one document, the metrics that are means over items, and bits per byte."""
    found = {}
    for metric, value in results.items():
        taken = task.aggregation().get(metric, mean)  # as the harness takes one that it is not told of
        if taken is mean:
            found[metric] = float(value)
        elif taken is bits_per_byte and value[1]:  # an empty document has none
            likelihood, size = value
            found[metric] = -likelihood / math.log(2) / size
    return found


def _language(task: str) -> str:
    """Of a name that ends with a two-letter code: `xnli_fr` -> `fr`; else none."""
    stem, _, code = task.rpartition("_")
    if not stem or len(code) != 2:
        return ""
    try:
        language_name(code)
    except SpecError:
        return ""
    return code


@contextlib.contextmanager
def _as_the_harness_runs() -> Iterator[None]:
    """Seeded as it seeds itself, without a word: it prints, logs, warns and draws bars."""
    states = random.getstate(), np.random.get_state()
    disabled = logging.root.manager.disable
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _content(task: Task) -> list[Any]:
    """What a task's numbers depend on, beside the model and how requests are tokenised."""
    names = ("num_fewshot", "metric_list", "filter_list", "repeats")
    settings = [task.task_name, task.VERSION, *(task.get_config(name) for name in names)]
    return [settings, [[one.doc_id, one.doc, one.args] for one in task.instances]]


def _plain(value: Any) -> str:
    """What JSON does not know: a function by its name, anything else as its text."""
    return str(getattr(value, "__qualname__", value))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
