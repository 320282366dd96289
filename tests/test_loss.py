"""Losses: by hand, their resamples against plain ratios, and what runs with different lines share."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mlprune.evaluation.items import Items, metrics_of
from mlprune.evaluation.loss import (
    loss_metrics,
    loss_samples,
    lower_is_better,
    objective_samples,
    shared_items,
    worst_language,
)
from mlprune.evaluation.resampling import metric_samples
from tests.runs import choice, likelihood, names, of_languages, sentences, translation, value

NAN, INF = math.nan, math.inf
ALL = ["loss.en", "loss.fr", "loss.de", "loss.mean", "loss.worst"]


def bits(**values: float) -> dict[str, float]:
    """Return the metrics of a run, with a summary and a task that are no language's loss."""
    summaries = {"bits_per_byte": 9.0, "bits_per_byte.mean": 9.0, "bits_per_byte.worst": 9.0, "xnli.en": 0.5}
    return summaries | {f"bits_per_byte.{code}": value for code, value in values.items()}


def test_losses_by_hand() -> None:
    """Swahili has the most bits per byte, before and after; English has lost most."""
    losses = loss_metrics(bits(en=1.25, sw=3.9, fr=1.5), bits(en=1.0, sw=3.75, fr=1.5))
    assert losses == pytest.approx(
        {"loss.en": 0.25, "loss.sw": 0.04, "loss.fr": 0.0, "loss.mean": 0.29 / 3, "loss.worst": 0.25}
    )
    assert worst_language(losses | {"xnli.sw": 7.0}) == "en"


@pytest.mark.parametrize("order", [("en", "fr", "de"), ("fr", "de", "en"), ("de", "fr", "en")])
def test_nan_is_the_worst_loss(order: Sequence[str]) -> None:
    values = {"en": 1.0, "fr": NAN, "de": INF}
    losses = loss_metrics(bits(**{code: values[code] for code in order}), bits(en=1.0, fr=1.0, de=1.0))
    assert math.isnan(losses["loss.worst"])
    assert math.isnan(losses["loss.mean"])
    assert losses["loss.de"] == INF
    assert worst_language(losses) == "fr"


def test_samples_are_ratios_of_the_two_runs_on_the_same_draws() -> None:
    dense, run = of_languages(0, ("en", "fr", "de"), 40, np.arange(40) // 4)
    samples = loss_samples([choice([1, 0]), *run], [*dense, choice([1, 1])], ALL)
    assert {name: sample[0] for name, sample in samples.items()} == pytest.approx(
        loss_metrics(metrics_of(run), metrics_of(dense)), abs=1e-13
    )
    draws = [
        metric_samples(each, [f"bits_per_byte.{code}" for code in ("en", "fr", "de")]) for each in (dense, run)
    ]
    for count in range(300):
        before, after = ({name: sample[count] for name, sample in each.items()} for each in draws)
        expected = loss_metrics(after, before)
        assert {name: sample[count] for name, sample in samples.items()} == pytest.approx(expected, abs=1e-13)


def test_the_worst_loss_is_that_of_each_resample() -> None:
    """Two languages lose the same on average, on different lines: which lost most differs between resamples."""
    size = np.full(60, 100)
    dense = [likelihood(np.full(60, 100.0), size, code) for code in ("en", "fr")]
    harm = np.random.default_rng(1).normal(10, 5, (2, 60))
    harm += 10 - harm.mean(1, keepdims=True)
    run = [likelihood(100 + harm[index], size, code) for index, code in enumerate(("en", "fr"))]
    samples = loss_samples(run, dense, ["loss.en", "loss.fr", "loss.worst"])
    assert (samples["loss.worst"] == np.maximum(samples["loss.en"], samples["loss.fr"])).all()
    assert 0.3 < (samples["loss.worst"] == samples["loss.en"]).mean() < 0.7
    assert samples["loss.worst"][1:].mean() > samples["loss.worst"][0]


def test_the_dense_model_loses_nothing() -> None:
    dense, _ = of_languages(2, ("en", "fr", "de"), 30)
    assert all((sample == 0).all() for sample in loss_samples(dense, dense, ALL).values())


def test_a_run_on_fewer_lines_is_held_to_the_same_lines_of_the_dense_model() -> None:
    dense, run = of_languages(3, ("en", "fr"), 40, np.arange(40) // 4)
    half = [part.select(names(40)[:20]) for part in run]
    expected = loss_samples(half, [part.select(names(40)[:20]) for part in dense], ["loss.mean"])["loss.mean"]
    assert (loss_samples(half, dense, ["loss.mean"])["loss.mean"] == expected).all()
    assert expected[0] != pytest.approx(loss_samples(run, dense, ["loss.mean"])["loss.mean"][0], rel=1e-3)


@pytest.mark.parametrize("name", ["loss.hi", "bits_per_byte.en", "loss", "mean"])
def test_an_unknown_loss_is_refused_by_name(name: str) -> None:
    dense, run = of_languages(3, ("en", "fr"), 5)
    with pytest.raises(ValueError, match=f"'{name}' is not a loss .* en, fr, mean, worst"):
        loss_samples(run, dense, [name])


def test_an_objective_is_a_loss_or_a_metric_of_the_run() -> None:
    dense, run = of_languages(4, ("en", "fr"), 30)
    run.append(choice([1, 0, 1]))
    assert (
        objective_samples(run, dense, "loss.worst") == loss_samples(run, dense, ["loss.worst"])["loss.worst"]
    ).all()
    assert (objective_samples(run, dense, "xnli.fr") == metric_samples(run, ["xnli.fr"])["xnli.fr"]).all()
    with pytest.raises(ValueError, match=r"'xnli.de' is not a metric .* xnli.fr"):
        objective_samples(run, dense, "xnli.de")


def test_direction_of_each_metric() -> None:
    for name in ("loss.mean", "loss.fr", "bits_per_byte", "bits_per_byte.worst", "perplexity.fr"):
        assert lower_is_better(name), name
    for name in ("wikitext.bits_per_byte", "own_task.brier_score", "own_task.perplexity.first"):
        assert lower_is_better(name), name
    for name in (
        "xnli.mean",
        "bleu.fr-en",
        "chrf.mean",
        "arc_easy.acc",
        "rankc.xnli.en-fr",
        "agreement.xnli.en-fr",
    ):
        assert not lower_is_better(name), name


def test_shared_items_are_those_of_all_runs_in_the_order_of_the_first() -> None:
    (a,), _ = of_languages(5, ("en",), 12, np.arange(12) // 3)
    b = [a.select(["7", "4", "5", "6", "11"]), choice([1, 1])]
    c = [value([0.5]), a.select(["11", "5", "6", "7", "0"])]
    shared = shared_items([a], b, c)
    assert [[part.ids for part in run] for run in shared] == [[("5", "6", "7", "11")]] * 3
    assert len({repr(run) for run in shared}) == 1
    assert shared[0][0].documents == ("document 1", "document 2", "document 2", "document 3")


def test_a_run_that_was_stored_without_documents_gets_those_of_the_other() -> None:
    (dense,), (run,) = of_languages(6, ("en",), 12, np.arange(12) // 3)
    old = replace(dense, documents=())
    assert shared_items([old], [run])[0] == [dense]
    expected = loss_samples([run], [dense], ["loss.en"])["loss.en"]
    assert (loss_samples([run], [old], ["loss.en"])["loss.en"] == expected).all()


def test_runs_of_different_texts_share_nothing() -> None:
    reference, output = sentences(0, 4, 0.3)
    parts: list[tuple[Items, Items]] = [
        (likelihood([1.0, 2.0], [3, 4]), likelihood([1.0, 2.0], [3, 5])),
        (choice([1, 0]), replace(choice([1, 0]), columns={"scores": ([1.0, 0.0],) * 2, "answer": (0, 1)})),
        (translation(output, reference), translation(output, output)),
    ]
    for a, b in parts:
        with pytest.raises(ValueError, match=rf"{a.name}: .*different texts"):
            shared_items([a], [b])
        with pytest.raises(ValueError, match=rf"{a.name}: .*no item in common"):
            shared_items([a.select(["0"])], [b.select(["1"])])
