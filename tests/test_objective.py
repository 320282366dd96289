"""Objectives: every metric that an evaluation yields can rank, and others are refused by name."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from mlprune.data.batches import RowSet
from mlprune.errors import SpecError
from mlprune.evaluation.suite import Suite
from mlprune.spec.loading import parse_spec
from mlprune.storage.results import Result
from mlprune.sweep.objective import check_objective, metric_names
from mlprune.sweep.ranking import Trial, rank_trials
from mlprune.sweep.trial import trial_metrics
from tests.trials import EN, FR
from tests.work import ready


class Guesser:
    """Stands for a model that says anything: random likelihoods, and text of random tokens."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def likelihood(self, rows: RowSet, variant: object = None, progress: object = None) -> list[float]:
        return [self._draw.uniform(10, 200) for _ in range(rows.count)]

    def likelihood_and_greedy(
        self, rows: RowSet, variant: object = None, progress: object = None
    ) -> list[tuple[float, bool]]:
        return [(nats, nats < 60) for nats in self.likelihood(rows)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Any,
        variant: object = None,
        progress: object = None,
    ) -> list[list[int]]:
        return [[self._draw.randrange(3, 384) for _ in range(max_new)] for _ in prompts]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Return all kinds of tasks."""
    folder = tmp_path_factory.mktemp("data")
    for code in ("en", "fr"):
        rows = [
            {"id": n, "premise": f"A {code} {n}", "hypothesis": "B", "review": f"{code} {n}", "label": n % 2}
            for n in range(6)
        ]
        (folder / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"languages": ["en", "fr"], "data": str(folder)}
    evaluation = {
        "perplexity": {"languages": ["en", "hi"], "lines": 16},
        "xnli": task,
        "reviews": task,
        "translation": {"pairs": ["fr-en", "en-fr"], "shots": 1, "lines": 3, "max_new_tokens": 5},
        "tasks": ["sample_xwinograd_en", "sample_xcopa_tr"],
        "task_items": 4,
    }
    return ready(folder / "store", evaluation=evaluation).suite


def trial(suite: Suite, seed: int, variant: Any) -> Trial:
    items = suite.run(Guesser(seed))
    forecasts = {"forecast.mean": 0.1}
    return Trial(Result(f"key {seed}", variant, {**trial_metrics(items), **forecasts}), items)


def test_every_named_metric_ranks(suite: Suite) -> None:
    """The names are those of real results, and the best is the one with the better value."""
    dense, a, b = trial(suite, 0, None), trial(suite, 1, EN), trial(suite, 2, FR)
    listed = metric_names(suite)
    assert len(set(listed)) == len(listed)
    assert {name for name in listed if not name.startswith("loss.")} == a.result.metrics.keys() - {"forecast.mean"}
    assert [name for name in listed if name.startswith("loss.")] == [
        "loss.en",
        "loss.hi",
        "loss.mean",
        "loss.worst",
    ]
    families = (
        "perplexity",
        "bits_per_byte",
        "xnli",
        "reviews",
        "bleu",
        "chrf",
        "sample_xcopa_tr",
        "rankc",
        "agreement",
    )
    assert {name.split(".")[0] for name in listed} >= set(families)
    for name in listed:
        check_objective(searching(name), suite)
        first, second = rank_trials([a, b], dense, name)
        low, high = sorted(entry.metrics[name] for entry in (first, second))
        losses = name.split(".")[0] in ("loss", "bits_per_byte", "perplexity")
        assert (first.metrics[name], second.metrics[name]) == ((low, high) if losses else (high, low)), name
        assert second.to_best is not None
        assert second.to_best.value == pytest.approx(second.metrics[name] - first.metrics[name], abs=1e-9), name


def searching(objective: str) -> Any:
    return parse_spec({"search": {"score": ["magnitude"], "sparsity": [0.5], "objective": objective}}).search


@pytest.mark.parametrize(
    "name", ["xnli.de", "xnli", "loss", "loss.fr", "chrf.de-en", "seconds.mask", "sparsity.actual", ""]
)
def test_an_unknown_objective_is_refused_with_the_known_names(name: str, suite: Suite) -> None:
    with pytest.raises(SpecError) as refused:
        check_objective(searching(name), suite)
    line = str(refused.value)
    assert line.startswith(
        f"search.objective: {name!r}: the evaluation does not yield it; write mean, worst or one of "
    )
    for known in ("loss.en", "loss.hi", "xnli.fr", "chrf.fr-en", "sample_xwinograd_en.acc", "rankc.xnli.en-fr"):
        assert known in line.replace(",", "").split()
    assert "\n" not in line


def test_mean_and_worst_are_those_of_the_loss() -> None:
    for objective, metric in {
        "mean": "loss.mean",
        "worst": "loss.worst",
        "loss.fr": "loss.fr",
        "xnli.fr": "xnli.fr",
    }.items():
        assert searching(objective).metric == metric
