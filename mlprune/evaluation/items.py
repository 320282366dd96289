"""What a run answered, item by item, and the metrics that follow from it.

Two runs are compared item by item (`significance.py`), and so are the answers of one run in two languages
(`consistency.py`); so a run keeps its items, and every metric is made of them.

BLEU and chrF are sacrebleu's (Post 2018), of the whole corpus. BLEU counts words: its default tokenizer (13a)
cuts at spaces and punctuation, its `zh` parts Chinese characters. Of other languages that write no spaces between
words, and of Korean, characters are counted: sacrebleu's tokenizers for Japanese and Korean need MeCab's
dictionaries, those of FLORES download a model. Read BLEU together with its signature, and chrF beside it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
BLEU_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"),
}
# what is told over the languages of a task; perplexities of different texts have no mean
SUMMARIES = {
    "bits_per_byte": ("mean", "worst"),
    "accuracy": ("mean", "worst"),
    "bleu": ("mean",),
    "chrf": ("mean",),
}


@dataclass(frozen=True)
class Items:
    """What one run answered, item by item, of one task in one language: columns of equal length.

    likelihood: nll (nats), tokens, bytes. choice: scores (a list of floats an item, one a label), answer (index of
    the right label). value: value (a float an item, a harness task's own `metric`). translation: output,
    reference (texts). Raises ValueError for other columns, unequal lengths, no items, an id twice, or a metric
    that is named for another kind than value, or not named for that.
    """

    task: str  # perplexity, xnli, reviews, translation, or a harness task
    language: str  # fr; en-fr for a translation; "" when a harness task does not say
    kind: Kind
    ids: tuple[str, ...]  # the same in every run and, where items are parallel, in every language
    columns: Mapping[str, tuple[Any, ...]]
    metric: str = ""  # of kind value: acc, exact_match, ...

    def __post_init__(self) -> None:
        if set(self.columns) != COLUMNS[self.kind]:
            raise ValueError(f"{self.name}: has columns {sorted(self.columns)}, not {sorted(COLUMNS[self.kind])}")
        if not self.ids or {len(column) for column in self.columns.values()} != {len(self.ids)}:
            raise ValueError(f"{self.name}: columns are empty or of unequal length")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{self.name}: an id is there twice")
        if (self.kind == "value") != bool(self.metric):
            raise ValueError(f"{self.name}: items of kind value name their metric, and no others do")

    @property
    def name(self) -> str:
        """For messages: `perplexity fr`, `arc_easy acc`."""
        return " ".join(part for part in (self.task, self.language, self.metric) if part)

    def at(self, ids: Sequence[str]) -> "Items":
        """The items named, in that order."""
        place = {name: index for index, name in enumerate(self.ids)}
        columns = {name: tuple(column[place[one]] for one in ids) for name, column in self.columns.items()}
        return Items(self.task, self.language, self.kind, tuple(ids), columns, self.metric)


def chosen(items: Items) -> list[int]:
    """The label of the highest score of each item; of equal ones the lowest index, and -1 where a score is NaN."""
    return [
        -1 if any(map(math.isnan, scores)) else max(range(len(scores)), key=scores.__getitem__)
        for scores in items.columns["scores"]
    ]


def outcomes(items: Items) -> list[float]:
    """Of kind choice 1.0 for each item answered rightly, else 0.0; of kind value the values."""
    if items.kind == "value":
        return list(items.columns["value"])
    return [float(label == answer) for label, answer in zip(chosen(items), items.columns["answer"], strict=True)]


def values_of(items: Items) -> dict[str, float]:
    """Metric -> value over all items: bits_per_byte and perplexity, accuracy, its own metric, or bleu and chrf.

    Perplexity is a token's. BLEU and chrF are from 0 to 100.
    """
    if items.kind == "likelihood":
        nll, tokens, size = (sum(items.columns[column]) for column in ("nll", "tokens", "bytes"))
        # beyond exp(700) a float is infinite
        return {"bits_per_byte": nll / math.log(2) / size, "perplexity": math.exp(min(nll / tokens, 700.0))}
    if items.kind == "translation":
        output, reference = items.columns["output"], items.columns["reference"]
        scorers = translation_scorers(items.language)
        return {name: scorer.corpus_score(output, [reference]).score for name, scorer in scorers.items()}
    return {items.metric or "accuracy": sum(outcomes(items)) / len(items.ids)}


def metrics_of(items: Sequence[Items]) -> dict[str, float]:
    """Every metric of a run by name.

    likelihood: `bits_per_byte.fr`, `perplexity.fr`; choice: `xnli.fr` (accuracy); translation: `bleu.en-fr`,
    `chrf.en-fr`; value: `arc_easy.acc`. Over the languages `bits_per_byte.mean` and `.worst`, `xnli.mean` and
    `.worst` (the lowest), `bleu.mean`, `chrf.mean`.
    """
    found: dict[str, float] = {}
    families: dict[tuple[str, str], list[float]] = {}
    for each in items:
        for metric, value in values_of(each).items():
            stem = each.task if each.kind in ("choice", "value") else metric
            last = metric if each.kind == "value" else each.language
            name = f"{stem}.{last}" if last else stem
            assert name not in found, name
            found[name] = value
            if each.kind != "value":
                families.setdefault((stem, metric), []).append(value)
    for (stem, metric), values in families.items():
        told = {"mean": sum(values) / len(values), "worst": _worst(metric, values)}
        found |= {f"{stem}.{summary}": told[summary] for summary in SUMMARIES.get(metric, ())}
    return found


def _worst(metric: str, values: Sequence[float]) -> float:
    """A NaN is the worst of all; `max` alone would pass over one that does not come first."""
    sign = 1 if metric == "bits_per_byte" else -1
    return max(values, key=lambda value: (math.isnan(value), sign * value))


def bleu_tokenizer(language: str) -> str:
    """The name of sacrebleu's tokenizer for texts in `language`; see the module's docstring."""
    return BLEU_TOKENIZERS.get(language, "13a")


def translation_scorers(pair: str) -> dict[str, "Metric"]:
    """sacrebleu's bleu and chrf for translations of `pair`: en-fr is into French."""
    return _scorers(bleu_tokenizer(pair.rpartition("-")[2]))


def _scorers(tokenizer: str) -> dict[str, "Metric"]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no warning of texts that look tokenized; a model's outputs are decoded text, whatever they look like
    return {"bleu": BLEU(tokenize=tokenizer, force=True), "chrf": CHRF()}


def signatures(pairs: Sequence[str]) -> dict[str, str]:
    """sacrebleu's signature of each metric of each pair: `bleu.en-fr`, `chrf.en-fr`."""
    found = {}
    for pair in pairs:
        for name, scorer in translation_scorers(pair).items():
            scorer.corpus_score(["a"], [["a"]])  # a scorer that has seen no references has no signature
            found[f"{name}.{pair}"] = str(scorer.get_signature())
    return found


def to_json(items: Sequence[Items]) -> str:
    """JSON text. Floats come back to the bit; NaN and Infinity are written so, as Python's json reads them."""
    return json.dumps({"format": FORMAT, "items": [vars(each) for each in items]})


def from_json(text: str) -> list[Items]:
    """What `to_json` wrote. Raises ValueError, in one line, for anything else."""
    from pydantic import TypeAdapter, ValidationError

    types: dict[str, Any] = {
        **dict.fromkeys(("nll", "value"), tuple[float, ...]),
        **dict.fromkeys(("tokens", "bytes", "answer"), tuple[int, ...]),
        **dict.fromkeys(("output", "reference"), tuple[str, ...]),
        "scores": tuple[list[float], ...],
    }
    try:
        found = TypeAdapter(_File).validate_json(text).items
        for each in found:
            for name, column in each.columns.items():
                TypeAdapter(types[name]).validate_python(column, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"not a run's items: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return found


@dataclass(frozen=True)
class _File:
    format: Literal["mlprune-items-1"]
    items: list[Items]
