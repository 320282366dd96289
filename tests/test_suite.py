"""All tasks of a spec together: one pass for all likelihoods, and the same items as each task alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlprune.evaluation.items import Items
from mlprune.evaluation.suite import Suite
from mlprune.shards.pipeline import LocalPipeline
from mlprune.sweep.masks import make_masks
from mlprune.sweep.prepare import Prepared
from tests.work import RANDOM, opened, ready

EVALUATION: dict[str, Any] = {
    "perplexity": {"languages": ["en", "hi"], "lines": 5},
    "xnli": {"languages": ["en", "fr"]},
    "reviews": {"languages": ["de"]},
    "translation": {"pairs": ["fr-en"], "shots": 1, "lines": 2, "max_new_tokens": 5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    for task, codes in (("xnli", ("en", "fr")), ("reviews", ("de",))):
        (folder / task).mkdir()
        for code in codes:
            texts = [{"premise": f"A {code} {n}", "hypothesis": "B", "review": f"{code} {n}"} for n in range(5)]
            rows = [text | {"label": n % 2} for n, text in enumerate(texts)]
            (folder / task / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {task: str(folder / task) for task in ("xnli", "reviews")}


def prepared(folder: Path, data: dict[str, str], shards: int = 1, **changes: Any) -> Prepared:
    sections = {name: dict(section) for name, section in EVALUATION.items()}
    for task, place in data.items():
        sections[task]["data"] = place
    for name, change in changes.items():
        sections[name] |= change
    return ready(folder, shards=shards, evaluation=sections)


def answers(items: list[Items]) -> list[tuple[str, str, Any]]:
    return [(one.task, one.language, dict(one.columns)) for one in items]


@pytest.mark.parametrize("shards", [1, 2])
def test_each_task_has_the_same_items_as_alone(shards: int, data: dict[str, str], tmp_path: Path) -> None:
    job = prepared(tmp_path, data, shards)
    suite = job.suite
    with opened(job) as pipeline:
        make_masks(job, pipeline, RANDOM)
        for variant in (None, RANDOM.key):
            together = suite.run(pipeline, variant)
            alone = [item for task in suite.likelihood_tasks for item in Suite((task,)).run(pipeline, variant)]
            alone += [item for task in suite.pipeline_tasks for item in task.run(pipeline, variant)]
            assert answers(together) == answers(alone)
    assert [(one.task, one.language) for one in together] == [
        *(("perplexity", code) for code in ("en", "hi")),
        *(("xnli", code) for code in ("en", "fr")),
        ("reviews", "de"),
        ("translation", "fr-en"),
    ]


def test_all_likelihoods_come_from_one_pass(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepared(tmp_path, data)
    passes: list[int] = []
    likelihood = LocalPipeline.likelihood

    def counted(self: LocalPipeline, rows: Any, *given: Any) -> list[float]:
        passes.append(rows.count)
        return likelihood(self, rows, *given)

    monkeypatch.setattr(LocalPipeline, "likelihood", counted)
    with opened(job) as pipeline:
        job.suite.run(pipeline)
    assert passes == [2 * 5 + 2 * 5 * 3 + 5 * 2]


def test_the_key_of_a_suite_stays_as_it_is(data: dict[str, str], tmp_path: Path) -> None:
    """Stored results are found by this key, which follows the keys of all tasks."""
    assert prepared(tmp_path, data).suite.key == "f58d61f817399394697127ebc1bd9ff2"


@pytest.mark.parametrize(
    "change",
    [
        {"perplexity": {"lines": 4}},
        {"xnli": {"items": 4}},
        {"xnli": {"template": "{premise}? {label}, {hypothesis}"}},
        {"reviews": {"labels": ["bad", "good"]}},
        {"translation": {"max_new_tokens": 6}},
        {"translation": {"lines": 1}},
    ],
    ids=str,
)
def test_a_changed_task_changes_the_keys(change: dict[str, Any], data: dict[str, str], tmp_path: Path) -> None:
    one, other = prepared(tmp_path, data), prepared(tmp_path, data, **change)
    assert one.suite.key == prepared(tmp_path, data).suite.key
    assert one.suite.key != other.suite.key
    assert one.result_key(RANDOM) != other.result_key(RANDOM)


def test_the_plan_includes_all_tasks(data: dict[str, str], tmp_path: Path) -> None:
    job = prepared(tmp_path, data)
    (translation,) = job.suite.pipeline_tasks
    assert translation.cached_tokens == 2 * translation.longest_row
    assert job.plan.memory[0].writing > 0
    assert ready(tmp_path).plan.memory[0].writing == 0
