"""Samples of metrics: against plain resampling, and against scipy's bootstrap."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mlprune.evaluation import resampling
from mlprune.evaluation.items import Items
from mlprune.evaluation.resampling import clusters, metric_samples
from mlprune.sweep.trial import trial_metrics
from tests.runs import (
    Array,
    choice,
    likelihood,
    lines,
    names,
    of_languages,
    runs_of_every_kind,
    sentences,
    translation,
    value,
)

NAN, INF = math.nan, math.inf


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    resampling._draws.cache_clear()
    monkeypatch.setattr(resampling, "RESAMPLES", 12)
    monkeypatch.setattr(resampling, "TRANSLATION_RESAMPLES", 5)
    yield
    resampling._draws.cache_clear()


def a_whole_run(seed: int) -> list[Items]:
    """All tasks: parallel lines in documents, answers in parallel and alone, texts, values."""
    draw = np.random.default_rng(seed)
    documents = np.sort(draw.integers(0, 5, 17))
    reference, output = sentences(seed, 17, 0.3)
    in_documents = tuple(f"document {number}" for number in documents)
    return [
        *of_languages(seed, ("en", "fr", "de"), 17, documents)[1],
        *(choice(draw.integers(0, 2, 11).tolist(), code) for code in ("en", "sw")),
        choice(draw.integers(0, 2, 8).tolist(), "hi"),
        choice(draw.integers(0, 2, 9).tolist(), "en", "reviews"),
        replace(translation(output, reference, "fr-en"), documents=in_documents),
        replace(translation(reference[::-1], reference, "de-en"), documents=in_documents),
        value(draw.uniform(size=13)),
        value(draw.uniform(size=13), "acc.strict"),
    ]


def drawn(part: Items, count: int) -> Items:
    """Return the items of the resample number `count`, each as often as its document or itself was drawn."""
    units = list(dict.fromkeys(part.units))
    generator = np.random.default_rng(resampling._seed(part.task, units))
    for _ in range(count):
        picked = generator.integers(len(units), size=len(units))
    rows = [row for index in picked for row, unit in enumerate(part.units) if unit == units[index]]
    columns = {name: tuple(column[row] for row in rows) for name, column in part.columns.items()}
    return replace(part, ids=names(len(rows)), columns=columns, documents=())


def plainly(items: Sequence[Items], count: int) -> Mapping[str, float]:
    return trial_metrics([drawn(part, count) for part in items])


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("seed", range(3))
def test_samples_of_every_metric_are_those_of_plain_resampling(seed: int) -> None:
    items = a_whole_run(seed)
    metrics = trial_metrics(items)
    samples = metric_samples(items, metrics)
    assert samples.keys() == metrics.keys()
    assert {name: sample[0] for name, sample in samples.items()} == pytest.approx(metrics, rel=1e-12)
    for count in range(1, 13):
        plain = plainly(items, count)
        texts = plainly(items, (count - 1) % 5 + 1)
        expected = {name: (texts if name.startswith(("bleu", "chrf")) else plain)[name] for name in metrics}
        assert {name: sample[count] for name, sample in samples.items()} == pytest.approx(expected, rel=1e-9)


def test_standard_errors_are_those_of_scipy() -> None:
    """Both draw 10,000 resamples, each its own: a standard error is exact to 1/sqrt(20,000) of itself, 0.7%."""
    nll, _, size = lines(1, 90)

    def bits(nll: Array, size: Array, axis: int) -> Array:
        of_sums: Array = nll.sum(axis) / size.sum(axis) / math.log(2)
        return of_sums

    kwargs: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": 10_000, "rng": 3}
    theirs = scipy.stats.bootstrap((nll, size), bits, method="percentile", **kwargs)
    ours = metric_samples([likelihood(nll, size)], ["bits_per_byte.fr"])["bits_per_byte.fr"]
    assert ours[1:].std(ddof=1) == pytest.approx(theirs.standard_error, rel=0.03)


def test_documents_are_drawn_whole() -> None:
    """Three documents of 1, 2 and 3 equal lines, of 1, 2 and 4 bits per byte; draws by hand."""
    nll = np.array([1, 2, 2, 4, 4, 4]) * math.log(2)
    run = likelihood(nll, [1] * 6, documents=[0, 1, 1, 2, 2, 2])
    samples = metric_samples([run], ["bits_per_byte.fr"])["bits_per_byte.fr"]
    by_hand = {  # how often each document is drawn -> bits over bytes, and in how many of 27 equally likely orders
        (3, 0, 0): (3 / 3, 1),
        (0, 3, 0): (12 / 6, 1),
        (0, 0, 3): (36 / 9, 1),
        (2, 1, 0): (6 / 4, 3),
        (2, 0, 1): (14 / 5, 3),
        (1, 2, 0): (9 / 5, 3),
        (0, 2, 1): (20 / 7, 3),
        (1, 0, 2): (25 / 7, 3),
        (0, 1, 2): (28 / 8, 3),
        (1, 1, 1): (17 / 6, 6),
    }
    assert samples[0] == pytest.approx(17 / 6)
    for bits, orders in by_hand.values():
        share = np.isclose(samples[1:], bits).mean()
        assert share == pytest.approx(orders / 27, abs=4 * math.sqrt(orders / 27 / 10_000))


def test_equal_lines_of_a_document_are_not_independent() -> None:
    """Eight equal lines a document: its lines say no more than one of them, so the error is sqrt(8) as large."""
    nll = np.repeat(np.random.default_rng(0).gamma(4, 1, 20), 8)
    by_line, by_document = likelihood(nll, [9] * 160), likelihood(nll, [9] * 160, documents=np.arange(160) // 8)
    errors = [
        metric_samples([run], ["bits_per_byte.fr"])["bits_per_byte.fr"].std() for run in (by_line, by_document)
    ]
    assert errors[1] / errors[0] == pytest.approx(math.sqrt(8), rel=0.05)
    assert clusters([by_line], ["bits_per_byte.fr"]) == 160
    assert clusters([by_document], ["bits_per_byte.fr"]) == 20


def test_parallel_languages_draw_the_same_lines_and_tasks_their_own() -> None:
    run, _ = of_languages(2, ("en", "fr"), 40)
    same = replace(run[0], language="fr")
    other_lines = replace(same, ids=tuple(f"fr {name}" for name in same.ids))
    other_task = [value(run[0].columns["nll"]), replace(value(run[0].columns["nll"]), task="arc")]
    samples = metric_samples([run[0], same], ["bits_per_byte.en", "bits_per_byte.fr"])
    assert (samples["bits_per_byte.en"] == samples["bits_per_byte.fr"]).all()
    samples = metric_samples([run[0], other_lines], ["bits_per_byte.en", "bits_per_byte.fr"])
    assert abs(np.corrcoef(list(samples.values()))[0, 1]) < 0.05
    samples = metric_samples(other_task, ["squad.f1", "arc.f1"])
    assert abs(np.corrcoef(list(samples.values()))[0, 1]) < 0.05


@pytest.mark.usefixtures("few_resamples")
def test_runs_are_drawn_alike_whatever_else_they_hold() -> None:
    items = runs_of_every_kind()
    for name in ("bits_per_byte.fr", "xnli.fr", "squad.f1", "chrf.fr-en"):
        alone = metric_samples([part for part in items if name in trial_names(part)], [name])[name]
        resampling._draws.cache_clear()
        assert metric_samples(items[::-1], trial_metrics(items))[name] == pytest.approx(alone, rel=1e-12)


def trial_names(part: Items) -> set[str]:
    return {f"{part.task}.{part.language or part.metric}", *(f"{name}.{part.language}" for name in part.metrics)}


@pytest.mark.parametrize(
    ("lengths", "effective"),
    [
        ([7], 1),
        ([8] * 6, 6),
        ([1] * 9, 9),
        ([21, 5, 22], 2),
        ([24, 3], 1),
        ([9, 8, 8, 8, 8, 7], 6),
        ([60, *[5] * 9], 3),
    ],
)
def test_documents_of_unequal_length_count_less(lengths: list[int], effective: int) -> None:
    documents = np.repeat(np.arange(len(lengths)), lengths)
    run = likelihood(np.ones(len(documents)), [1] * len(documents), documents=documents)
    assert clusters([run], ["bits_per_byte.fr"]) == effective


def test_clusters_are_those_of_the_smallest_part_that_is_read() -> None:
    items = a_whole_run(0)
    documents = clusters(items[:1], ["bits_per_byte.en"])
    assert 1 < documents < 8
    assert clusters(items, ["bits_per_byte.mean"]) == clusters(items, ["loss.worst"]) == documents
    assert clusters(items, ["xnli.en"]) == clusters(items, ["rankc.xnli.en-sw"]) == 11
    assert clusters(items, ["xnli.mean"]) == 8
    assert clusters(items, ["xnli.en", "squad.f1", "squad.acc.strict"]) == 11
    assert clusters(items, ["chrf.mean", "squad.f1"]) == documents


@pytest.mark.parametrize("broken", [NAN, INF])
def test_a_broken_language_has_no_finite_samples(broken: float) -> None:
    items = [likelihood([1.0, 2.0, 3.0], [4, 5, 6], "en"), likelihood([1.0, broken, 3.0], [4, 5, 6], "fr")]
    samples = metric_samples(items, trial_metrics(items))
    for name in ("bits_per_byte.fr", "bits_per_byte.mean", "bits_per_byte.worst"):
        assert repr(float(samples[name][0])) == repr(broken)
        assert not np.isfinite(samples[name]).all()
    assert np.isfinite(samples["bits_per_byte.en"]).all()


@pytest.mark.parametrize(
    "name", ["loss.fr", "bits_per_byte.hi", "xnli.median", "mean", "squad.mean", "perplexity.mean"]
)
def test_an_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not a metric .* bits_per_byte.fr"):
        metric_samples(runs_of_every_kind(), [name])


def test_counts_become_floats_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = of_languages(4, ("en",), 30)
    whole = metric_samples(run, ["bits_per_byte.en"])["bits_per_byte.en"]
    monkeypatch.setattr(resampling, "CELLS", 1000)
    assert metric_samples(run, ["bits_per_byte.en"])["bits_per_byte.en"] == pytest.approx(whole, rel=1e-12)
