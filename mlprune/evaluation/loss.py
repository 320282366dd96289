"""Loss: how many more bits per byte a run needs than the dense model, as a relative change per language.

Bits per byte do not compare between languages, their relative changes do: loss.fr = 0.04 means that French needs
4% more bits per byte than from the dense model. The metrics of a run are in `items`, resamples in `resampling`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mlprune.evaluation.items import Items
from mlprune.evaluation.resampling import Samples, metric_samples

BITS, LOSS = "bits_per_byte.", "loss."
SUMMARIES = ("mean", "worst")
LOWER_IS_BETTER = {
    *("bits_per_byte", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "ter", "loss"),
}
TEXTS = {"likelihood": "bytes", "choice": "answer", "translation": "reference"}  # columns equal in all runs


def lower_is_better(metric: str) -> bool:
    """Return whether a lower value of a metric, e.g. `loss.fr` or `wikitext.bits_per_byte`, is better."""
    return not LOWER_IS_BETTER.isdisjoint(metric.split("."))


def loss_metrics(metrics: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Return loss.<language> of a run's metrics against the dense model's, loss.mean, and loss.worst, the largest.

    NaN is the worst of all. Both must be metrics of the same lines.
    """
    losses = {
        name.removeprefix(BITS): value / dense[name] - 1
        for name, value in metrics.items()
        if name.startswith(BITS) and name.removeprefix(BITS) not in SUMMARIES
    }
    summaries = {"mean": sum(losses.values()) / len(losses), "worst": losses[_worst(losses)]}
    return {LOSS + name: value for name, value in (losses | summaries).items()}


def worst_language(metrics: Mapping[str, float]) -> str:
    """Return the language with the largest of the losses `loss.<language>` in `metrics`."""
    languages = {name.removeprefix(LOSS): value for name, value in metrics.items() if name.startswith(LOSS)}
    return _worst({name: value for name, value in languages.items() if name not in SUMMARIES})


def _worst(losses: Mapping[str, float]) -> str:
    return max(losses, key=lambda language: (math.isnan(losses[language]), losses[language]))


def loss_samples(items: Sequence[Items], dense_items: Sequence[Items], names: Iterable[str]) -> dict[str, Samples]:
    """Return the samples of metrics of `loss_metrics`, of the lines that both runs have.

    Each resample draws the same lines for both runs. `loss.worst` is the largest loss of each resample. Raises
    ValueError for a name that is not a loss, or as `shared_items` does.
    """
    runs = shared_items(*([part for part in run if part.kind == "likelihood"] for run in (items, dense_items)))
    bits = [BITS + part.language for part in runs[0]]
    own, dense = (metric_samples(run, bits) for run in runs)
    losses = {name.removeprefix(BITS): own[name] / dense[name] - 1 for name in bits}
    stacked = list(losses.values())
    losses |= {"mean": np.mean(stacked, axis=0), "worst": np.max(stacked, axis=0)}
    samples = {}
    for name in names:
        language = name.removeprefix(LOSS)
        if not name.startswith(LOSS) or language not in losses:
            raise ValueError(f"{name!r} is not a loss of these items; they have {', '.join(losses)}")
        samples[name] = losses[language]
    return samples


def objective_samples(items: Sequence[Items], dense_items: Sequence[Items], metric: str) -> Samples:
    """Return the samples of any metric, a loss or one of the run itself. Raises ValueError as these do."""
    if metric.startswith(LOSS):
        return loss_samples(items, dense_items, [metric])[metric]
    return metric_samples(items, [metric])[metric]


def shared_items(*runs: Sequence[Items]) -> list[list[Items]]:
    """Return the runs, each with only the parts (tasks and languages) and the items that all of them have.

    Parts and items are in the order of the first run, and have documents in all runs if they do in one: a run that
    an earlier version stored has none. Raises ValueError, naming the part, if the runs share none of its items, or
    their texts differ.
    """
    by_part = [{(x.task, x.language, x.kind, x.metric): x for x in run} for run in runs]
    assert [len(parts) for parts in by_part] == [len(run) for run in runs], "a part is repeated in one run"
    common = [part for part in by_part[0] if all(part in parts for parts in by_part)]
    shared = [_shared([parts[part] for parts in by_part]) for part in common]
    return [[parts[index] for parts in shared] for index in range(len(runs))]


def _shared(parts: Sequence[Items]) -> list[Items]:
    """Return one part of all runs with the items that all of them have."""
    first = parts[0]
    sets = [set(part.ids) for part in parts]
    ids = [name for name in first.ids if all(name in own for own in sets)]
    if not ids:
        raise ValueError(f"{first.name}: the runs have no item in common")
    parts = [part if part.ids == tuple(ids) else part.select(ids) for part in parts]
    if first.kind != "value" and len({part.columns[TEXTS[first.kind]] for part in parts}) > 1:
        raise ValueError(f"{first.name}: the runs have different texts under the same item ids")
    documents = next((part.documents for part in parts if part.documents), ())
    return [replace(part, documents=documents) for part in parts]
