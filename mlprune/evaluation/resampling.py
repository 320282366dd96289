"""Bootstrap samples of a run's metrics: the value of each metric on the run itself, then on each resample.

A resample draws documents with replacement where the items have documents, else items (Efron 1979; for documents
the cluster bootstrap of Davison and Hinkley 1997, section 3.8; for BLEU Koehn, EMNLP 2004). Runs with the same
documents get the same draws, so differences between runs are paired. So do the languages of a task with the same
documents or, if they have none, the same items: they are parallel text. Other tasks are drawn independently.
Intervals and tests are in `estimates`.

Every metric is a function of sums over items, so a resample is a vector of counts, and all resamples are one
matrix product.

N: items. D: documents, or items that have none. R: resamples, after one row for the run itself. C: sums.
"""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.consistency import agreements, language_pairs, rank_overlaps
from mlprune.evaluation.items import (
    SUMMARIES,
    Items,
    metric_name,
    metric_stem,
    outcomes,
    translation_scorers,
)

Samples = NDArray[np.float64]  # [1 + RESAMPLES]
RESAMPLES = 10_000
# sacrebleu computes a score in 40 us. With 1,000 resamples a standard error is exact to 2%.
TRANSLATION_RESAMPLES = 1000
SEED = 0  # fixed, so that the same runs always get the same samples
CELLS = 2**22  # of a block of counts that is converted to floats at a time


@dataclass(frozen=True)
class _Source:
    """A metric of one part of a run, or of the answers to one task in two languages."""

    metric: str  # of `Items.metrics`; rankc or agreement for two languages
    parts: tuple[Items, ...]


def metric_samples(items: Sequence[Items], names: Iterable[str]) -> dict[str, Samples]:
    """Return the samples of each of the metrics `names`, as `sweep.trial.trial_metrics` names them.

    Samples of BLEU and chrF repeat after TRANSLATION_RESAMPLES. Samples are not finite where the metric is not.
    Raises ValueError for a name that is not a metric of the items.
    """
    sources = _sources(items)
    members_of = {name: _members(sources, name) for name in names}
    needed = dict.fromkeys(member for members in members_of.values() for member in members)
    samples = _source_samples({name: sources[name] for name in needed})
    return {
        name: _summarise(name, [samples[member] for member in members]) for name, members in members_of.items()
    }


def clusters(items: Sequence[Items], names: Iterable[str]) -> int:
    """Return the effective number of independent units (documents, else items) that `names` are computed from.

    Documents of unequal length count as (sum n)^2 / sum n^2 for n items each (Kish 1965), rounded: of 48 lines in
    documents of 21, 5 and 22, the short one says little, and they count as 2. The number is the smallest of all
    parts that the metrics read; `loss.fr` reads what `bits_per_byte.fr` does. Raises ValueError as
    `metric_samples` does.
    """
    sources = _sources(items)
    names = [re.sub("^loss[.]", "bits_per_byte.", name) for name in names]
    members = [member for name in names for member in _members(sources, name)]
    return min(_effective_number(part.units) for member in members for part in sources[member].parts)


def _effective_number(units: Sequence[str]) -> int:
    counts = Counter(units).values()
    return round(len(units) ** 2 / sum(count**2 for count in counts))


def _sources(items: Sequence[Items]) -> dict[str, _Source]:
    """Return all metrics that are not summaries over languages, by name."""
    sources = {metric_name(part, metric): _Source(metric, (part,)) for part in items for metric in part.metrics}
    for name, pair in language_pairs(items).items():
        sources |= {f"{metric}.{name}": _Source(metric, pair) for metric in ("rankc", "agreement")}
    return sources


def _members(sources: Mapping[str, _Source], name: str) -> list[str]:
    """Return the metrics that a metric is computed from: itself, or one per language for a summary."""
    if name in sources:
        return [name]
    stem, _, summary = (name if name != "bits_per_byte" else "bits_per_byte.mean").rpartition(".")
    members = [
        member
        for member, source in sources.items()
        if summary in SUMMARIES.get(source.metric, ())
        and source.parts[0].kind != "value"
        and metric_stem(source.parts[0], source.metric) == stem
    ]
    if not members:
        raise ValueError(f"{name!r} is not a metric of these items; they have {', '.join(sources)} and summaries")
    return members


def _summarise(name: str, samples: Sequence[Samples]) -> Samples:
    """Return the mean or the worst over languages; NaN is the worst of all."""
    if len(samples) == 1:
        return samples[0]
    if not name.endswith(".worst"):
        mean: Samples = np.mean(np.stack(samples), axis=0)
        return mean
    worst: Samples = np.max(samples, axis=0) if name.startswith("bits_per_byte") else np.min(samples, axis=0)
    return worst


def _source_samples(sources: Mapping[str, _Source]) -> dict[str, Samples]:
    """Return the samples of each metric. Those with the same task and units share draws and one matrix product."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, source in sources.items():
        part = source.parts[0]
        groups.setdefault((part.task, tuple(dict.fromkeys(part.units))), []).append(name)
    samples = {}
    with np.errstate(invalid="ignore", over="ignore"):  # of a broken model
        for (task, units), names in groups.items():
            sums_DC = [_unit_sums(sources[name], units) for name in names]
            sums_RC = _resample(_draws(_seed(task, units), len(units)), np.concatenate(sums_DC, 1))
            ends = np.cumsum([sums.shape[1] for sums in sums_DC])
            for name, own_sums_RC in zip(names, np.split(sums_RC, ends[:-1], axis=1), strict=True):
                samples[name] = _values(sources[name], own_sums_RC)
    return samples


def _unit_sums(source: _Source, units: Sequence[str]) -> Samples:
    """Return the sums of a metric over the items of each unit, [D, C]."""
    sums_NC = _item_sums(source)
    place = {unit: index for index, unit in enumerate(units)}
    sums_DC = np.zeros((len(units), sums_NC.shape[1]))
    np.add.at(sums_DC, [place[unit] for unit in source.parts[0].units], sums_NC)
    return sums_DC


def _item_sums(source: _Source) -> Samples:
    """Return what each item adds to the sums of a metric: numerator and denominator, or sacrebleu's counts."""
    part = source.parts[0]
    if part.kind == "translation":
        scorer = translation_scorers(part.language)[source.metric]
        # sacrebleu has no public function for the counts of each segment
        return np.array(
            scorer._extract_corpus_statistics(part.columns["output"], [part.columns["reference"]]), float
        )
    if part.kind == "likelihood":
        size = "bytes" if source.metric == "bits_per_byte" else "tokens"
        return np.array([part.columns["nll"], part.columns[size]], float).T
    if source.metric == "rankc":
        value_N = rank_overlaps(*source.parts)
    elif source.metric == "agreement":
        value_N = agreements(*source.parts)
    else:
        value_N = np.array(outcomes(part))
    return np.stack([value_N, np.ones(len(value_N))], 1)


def _values(source: _Source, sums_RC: Samples) -> Samples:
    """Return the metric for each row of sums."""
    kind = source.parts[0].kind
    if kind == "translation":
        return _translation_values(source, sums_RC)
    ratio_R: Samples = sums_RC[:, 0] / sums_RC[:, 1]
    if kind == "likelihood" and source.metric == "perplexity":
        return np.exp(np.minimum(ratio_R, 700.0))  # limited as in `items.values_of`
    return ratio_R / math.log(2) if kind == "likelihood" else ratio_R


def _translation_values(source: _Source, sums_RC: Samples) -> Samples:
    scorer = translation_scorers(source.parts[0].language)[source.metric]
    rows = sums_RC[: 1 + TRANSLATION_RESAMPLES].tolist()
    own, *resampled = [scorer._compute_score_from_stats(row).score for row in rows]
    return np.concatenate([[own], np.resize(resampled, RESAMPLES)])


def _seed(task: str, units: Sequence[str]) -> int:
    """Return the seed of the draws: it depends on the task and the names of the units alone."""
    return int.from_bytes(hashlib.sha256(json.dumps([SEED, task, *units]).encode()).digest()[:16], "big")


@functools.lru_cache(maxsize=2)  # trials of a sweep are compared on the same lines
def _draws(seed: int, units: int) -> NDArray[np.uint8]:
    """Return how often each resample draws each unit, [1 + R, D]; the first row is the run itself, each once.

    No unit is ever drawn more than 255 times: the counts are nearly Poisson, with mean 1.
    """
    generator = np.random.default_rng(seed)
    counts_RD = np.ones((1 + RESAMPLES, units), np.uint8)
    for count_D in counts_RD[1:]:
        count_D[:] = np.bincount(generator.integers(units, size=units), minlength=units)
    return counts_RD


def _resample(counts_RD: NDArray[np.uint8], sums_DC: Samples) -> Samples:
    """Return the sums of each resample, [1 + R, C]. The counts become floats in blocks, to save memory."""
    blocks = np.array_split(counts_RD, math.ceil(counts_RD.size / CELLS))
    return np.concatenate([block.astype(float) @ sums_DC for block in blocks])
