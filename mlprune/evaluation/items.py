"""The results of a run, item by item, and the metrics that are computed from them.

Two runs are compared item by item (`significance`), and so are the answers of one run in two languages
(`consistency`). Therefore a run keeps its items, and every metric is computed from them. The tasks that produce
items are in other modules.

BLEU and chrF are those of sacrebleu (Post 2018), over the whole corpus. BLEU counts words: its default tokenizer
(13a) splits at spaces and punctuation, its tokenizer `zh` splits Chinese into characters. For other languages that
write no spaces between words, and for Korean, characters are counted: sacrebleu's tokenizers for Japanese and
Korean need MeCab's dictionaries, those of FLORES download a model. Report BLEU with its signature and with chrF.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

Kind = Literal["likelihood", "choice", "value", "translation"]
COLUMNS: dict[Kind, set[str]] = {
    "likelihood": {"nll", "tokens", "bytes"},
    "choice": {"scores", "answer"},
    "value": {"value"},
    "translation": {"output", "reference"},
}
FORMAT = "mlprune-items-1"
MAX_COUNT = 2**40  # tokens or bytes of an item that is read
BLEU_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"),
}
# The metrics of each kind; items of kind value name their own.
METRICS: dict[Kind, tuple[str, ...]] = {
    "likelihood": ("bits_per_byte", "perplexity"),
    "choice": ("accuracy",),
    "translation": ("bleu", "chrf"),
}
# How each metric is summarised over the languages of a task. Perplexities of different texts have no mean.
SUMMARIES = {
    "bits_per_byte": ("mean", "worst"),
    "accuracy": ("mean", "worst"),
    "bleu": ("mean",),
    "chrf": ("mean",),
}


@dataclass(frozen=True)
class Items:
    """The results of one run for one task in one language, item by item: columns of equal length.

    The columns of each kind:

    likelihood: nll (nats), tokens, bytes
    choice: scores (a list of floats per item, one per label), answer (index of the right label)
    value: value (one float per item: a harness task's own `metric`)
    translation: output, reference (texts)

    Items of one document are not independent, so `resampling` draws whole documents.

    Raises ValueError for other columns, unequal lengths, no items, a repeated id, or a metric that is named for
    another kind than value or is missing for that kind.
    """

    task: str  # perplexity, xnli, reviews, translation, or a harness task
    language: str  # e.g. fr; en-fr for a translation; "" when the name of a harness task has none
    kind: Kind
    ids: tuple[str, ...]  # identical in every run and, where items are parallel, in every language
    columns: Mapping[str, tuple[Any, ...]]
    metric: str = ""  # kind value only: acc, exact_match, ...
    documents: tuple[str, ...] = ()  # the document of each item; empty: the items are independent

    def __post_init__(self) -> None:
        if set(self.columns) != COLUMNS[self.kind]:
            raise ValueError(f"{self.name}: has columns {sorted(self.columns)}, not {sorted(COLUMNS[self.kind])}")
        lengths = {len(column) for column in (*self.columns.values(), self.documents or self.ids)}
        if not self.ids or lengths != {len(self.ids)}:
            raise ValueError(f"{self.name}: columns are empty or of unequal length")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{self.name}: an id is repeated")
        if (self.kind == "value") != bool(self.metric):
            raise ValueError(f"{self.name}: items of kind value name their metric, and no others do")

    @property
    def name(self) -> str:
        """The name in messages, e.g. `perplexity fr` or `arc_easy acc`."""
        return " ".join(part for part in (self.task, self.language, self.metric) if part)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of its metrics, without task and language."""
        return (self.metric,) if self.kind == "value" else METRICS[self.kind]

    @property
    def units(self) -> tuple[str, ...]:
        """The independent unit that each item belongs to: its document, else the item itself."""
        return self.documents or self.ids

    def select(self, ids: Sequence[str]) -> "Items":
        """Return the items with these ids, in this order."""
        position = {name: index for index, name in enumerate(self.ids)}
        columns = {name: tuple(column[position[item]] for item in ids) for name, column in self.columns.items()}
        documents = tuple(self.documents[position[item]] for item in ids) if self.documents else ()
        return Items(self.task, self.language, self.kind, tuple(ids), columns, self.metric, documents)


def metric_stem(part: Items, metric: str) -> str:
    """Return how the names of a metric begin: with the task for answers and values, else with the metric."""
    return part.task if part.kind in ("choice", "value") else metric


def metric_name(part: Items, metric: str) -> str:
    """Return a metric's name among those of a run, as listed in `metrics_of`."""
    last = metric if part.kind == "value" else part.language
    stem = metric_stem(part, metric)
    return f"{stem}.{last}" if last else stem


def join_items(items: Sequence[Items]) -> list[Items]:
    """Join the items of each task, language and metric, which may be in several parts, in order of appearance."""
    parts: dict[tuple[str, str, str], list[Items]] = {}
    for part in items:
        parts.setdefault((part.task, part.language, part.metric), []).append(part)
    return [same[0] if len(same) == 1 else _concatenated(same) for same in parts.values()]


def _concatenated(parts: Sequence[Items]) -> Items:
    first = parts[0]
    columns = {name: tuple(chain.from_iterable(part.columns[name] for part in parts)) for name in first.columns}
    return replace(
        first,
        ids=tuple(chain.from_iterable(part.ids for part in parts)),
        columns=columns,
        documents=tuple(chain.from_iterable(part.documents for part in parts)),
    )


def chosen_labels(items: Items) -> list[int]:
    """Return the label with the highest score of each item: for ties the lowest index, -1 where a score is NaN."""
    return [
        -1 if any(map(math.isnan, scores)) else max(range(len(scores)), key=scores.__getitem__)
        for scores in items.columns["scores"]
    ]


def outcomes(items: Items) -> list[float]:
    """Return one number per item: for choices 1.0 if the answer is right, else 0.0; for values the value."""
    if items.kind == "value":
        return list(items.columns["value"])
    return [
        float(label == answer) for label, answer in zip(chosen_labels(items), items.columns["answer"], strict=True)
    ]


def values_of(items: Items) -> dict[str, float]:
    """Return metric -> value over all items.

    The metrics are bits_per_byte and perplexity (per token), accuracy, a harness task's own metric, or bleu and
    chrf (from 0 to 100).
    """
    if items.kind == "likelihood":
        nll, tokens, size = (sum(items.columns[column]) for column in ("nll", "tokens", "bytes"))
        # limited to exp(700), because exp of a little more overflows a float
        return {"bits_per_byte": nll / math.log(2) / size, "perplexity": math.exp(min(nll / tokens, 700.0))}
    if items.kind == "translation":
        output, reference = items.columns["output"], items.columns["reference"]
        scorers = translation_scorers(items.language)
        return {name: scorer.corpus_score(output, [reference]).score for name, scorer in scorers.items()}
    return {items.metric or "accuracy": sum(outcomes(items)) / len(items.ids)}


def metrics_of(items: Sequence[Items]) -> dict[str, float]:
    """Return every metric of a run by name.

    likelihood: `bits_per_byte.fr`, `perplexity.fr`; choice: `xnli.fr` (accuracy); translation: `bleu.en-fr`,
    `chrf.en-fr`; value: `arc_easy.acc`. Summaries over the languages: `bits_per_byte.mean` and `.worst`,
    `xnli.mean` and `.worst` (the lowest), `bleu.mean`, `chrf.mean`.
    """
    metrics: dict[str, float] = {}
    families: dict[tuple[str, str], list[float]] = {}
    for part in items:
        for metric, value in values_of(part).items():
            name = metric_name(part, metric)
            assert name not in metrics, name
            metrics[name] = value
            if part.kind != "value":
                families.setdefault((metric_stem(part, metric), metric), []).append(value)
    for (stem, metric), values in families.items():
        summaries = {"mean": sum(values) / len(values), "worst": _worst(metric, values)}
        metrics |= {f"{stem}.{summary}": summaries[summary] for summary in SUMMARIES.get(metric, ())}
    return metrics


def _worst(metric: str, values: Sequence[float]) -> float:
    """Return the worst value. NaN is the worst of all; `max` alone would ignore a NaN that does not come first."""
    sign = 1 if metric == "bits_per_byte" else -1
    return max(values, key=lambda value: (math.isnan(value), sign * value))


def bleu_tokenizer(language: str) -> str:
    """Return the name of sacrebleu's tokenizer for texts in `language`; see the top of the file."""
    return BLEU_TOKENIZERS.get(language, "13a")


def translation_scorers(pair: str) -> dict[str, "Metric"]:
    """Return sacrebleu's bleu and chrf scorers for translations of `pair`; en-fr is from English into French."""
    return _scorers(bleu_tokenizer(pair.rpartition("-")[2]))


def _scorers(tokenizer: str) -> dict[str, "Metric"]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no warning about texts that look tokenized; outputs are decoded text, whatever they look like
    return {"bleu": BLEU(tokenize=tokenizer, force=True), "chrf": CHRF()}


def signatures(pairs: Sequence[str]) -> dict[str, str]:
    """Return sacrebleu's signature of each metric of each pair: `bleu.en-fr`, `chrf.en-fr`."""
    signature_of = {}
    for pair in pairs:
        for name, scorer in translation_scorers(pair).items():
            scorer.corpus_score(["a"], [["a"]])  # a scorer has no signature before it has seen references
            signature_of[f"{name}.{pair}"] = str(scorer.get_signature())
    return signature_of


def to_json(items: Sequence[Items]) -> str:
    """Return the items as JSON. Floats survive exactly; NaN and Infinity are written as Python reads them."""
    return json.dumps({"format": FORMAT, "items": [vars(part) for part in items]})


def from_json(text: str) -> list[Items]:
    """Read what `to_json` wrote. Raises ValueError, in one line, for anything else."""
    from pydantic import TypeAdapter, ValidationError

    types: dict[str, Any] = {
        **dict.fromkeys(("nll", "value"), tuple[float, ...]),
        **dict.fromkeys(("tokens", "bytes", "answer"), tuple[int, ...]),
        **dict.fromkeys(("output", "reference"), tuple[str, ...]),
        "scores": tuple[list[float], ...],
    }
    try:
        items = TypeAdapter(_File).validate_json(text).items
        for part in items:
            for name, column in part.columns.items():
                TypeAdapter(types[name]).validate_python(column, strict=True)
        _check_items(items)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"not a run's items: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return items


def _check_items(items: Sequence[Items]) -> None:
    """Raise ValueError for what no run yields: a part twice, counts that are not, an answer that is no option."""
    names = [part.name for part in items]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"not a run's items: {min(twice)} is there twice")
    for part in items:
        for name in ("tokens", "bytes"):
            if not all(0 < count <= MAX_COUNT for count in part.columns.get(name, ())):
                raise ValueError(f"not a run's items: {part.name}: {name} must be in [1, {MAX_COUNT}]")
        if part.kind == "choice" and not all(
            0 <= answer < len(scores)
            for scores, answer in zip(part.columns["scores"], part.columns["answer"], strict=True)
        ):
            raise ValueError(f"not a run's items: {part.name}: an answer is none of the options")


@dataclass(frozen=True)
class _File:
    """The layout of the JSON text."""

    format: Literal["mlprune-items-1"]
    items: list[Items]
