"""Loaded tasks of lm-evaluation-harness as one pipeline task, and their metrics per document.

Metrics are kept per document, so only those that are means over documents are used: acc, acc_norm, exact_match
and the like. A task's metrics of a whole set (F1, BLEU) are left out. For a task that requests the likelihood of
documents, the metric is bits per byte; its mean over documents is not the harness's number, which weighs documents
by length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lm_eval.api.metrics import bits_per_byte, mean

from mlprune.errors import SpecError
from mlprune.evaluation.harness.isolation import seeded_and_silent
from mlprune.evaluation.harness.requests import Requests
from mlprune.evaluation.items import Items
from mlprune.evaluation.suite import EvaluatedModel
from mlprune.shards.decoding import kept_at_once
from mlprune.shards.pipeline import Progress
from mlprune.spec.languages import language_name

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

KEPT_AGGREGATIONS = (mean, bits_per_byte)


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of lm-evaluation-harness, loaded and checked. Once pickled, it does not need their files."""

    tasks: tuple[str, ...]  # names of the tasks, with groups expanded
    key: str  # a content hash of documents, requests, their tokens and the harness's version
    requests: Requests
    _loaded: tuple[Task, ...]  # with their requests, in the same order

    @property
    def tokens(self) -> int:
        """The number of tokens of all requests, padding included."""
        return self.requests.tokens

    @property
    def longest_row(self) -> int:
        """The number of tokens of the longest row, or of the longest prompt and its text."""
        return self.requests.longest_row

    @property
    def cached_tokens(self) -> int:
        """Tokens of the rows that are generated at the same time, prompts included; 0 if nothing is generated."""
        return kept_at_once(len(self.requests.generations), self.requests.longest_generation)

    def run(self, model: EvaluatedModel, variant: str | None, progress: Progress | None = None) -> list[Items]:
        """Return the metrics of each task by document, of the dense model (`variant` None) or of a variant."""
        responses = iter(self.requests.responses(model, variant, progress))
        items = []
        with seeded_and_silent():
            for loaded in self._loaded:
                # a copy, so that the loaded task stays without responses and serves the next variant
                task = copy.copy(loaded)
                task._instances = [
                    replace(instance, resps=[next(responses)] * instance.repeats, filtered_resps={})
                    for instance in loaded.instances
                ]
                task.apply_filters()
                items += _items(task)
        return items


def _items(task: Task) -> list[Items]:
    """Return each metric of a task that has its responses, with the documents that have the metric."""
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    filters = list(task.instances[0].filtered_resps)
    metrics: dict[str, dict[str, float]] = {}
    for number, instances in by_document.items():
        for filter_name in filters:
            ordered = sorted(instances, key=lambda instance: instance.idx)
            responses = [instance.filtered_resps[filter_name] for instance in ordered]
            for metric, value in _values(task, task.process_results(instances[0].doc, responses)).items():
                name = metric if len(filters) == 1 else f"{metric}.{filter_name}"
                metrics.setdefault(name, {})[str(number)] = value
    return [
        Items(
            task.task_name,
            task_language(task.task_name),
            "value",
            ids=tuple(values),
            columns={"value": tuple(values.values())},
            metric=metric,
        )
        for metric, values in metrics.items()
    ]


def _values(task: Task, results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one document that are means over documents, and bits per byte."""
    values = {}
    for metric, value in results.items():
        aggregation = task.aggregation().get(
            metric, mean
        )  # the harness's default for a metric that is not declared
        if aggregation is mean:
            values[metric] = float(value)
        elif aggregation is bits_per_byte and value[1]:  # an empty document has none
            likelihood, size = value
            values[metric] = -likelihood / math.log(2) / size
    return values


def task_language(task: str) -> str:
    """Return the language of a task whose name ends with a two-letter code, e.g. `xnli_fr` -> `fr`; else ""."""
    stem, _, code = task.rpartition("_")
    if not stem or len(code) != 2:
        return ""
    try:
        language_name(code)
    except SpecError:
        return ""
    return code
