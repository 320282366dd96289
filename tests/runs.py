"""Items of every kind, by hand or at random, for tests of statistics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.items import Items

Array = NDArray[Any]
TEXT = "the cat sat on a mat while it rained in north and south of town today"


def names(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def plain(column: Sequence[float] | Array) -> tuple[Any, ...]:
    return tuple(np.asarray(column).tolist())


def likelihood(
    nll: Sequence[float] | Array,
    size: Sequence[int] | Array,
    language: str = "fr",
    documents: Sequence[int] | Array = (),
) -> Items:
    columns = {"nll": plain(nll), "tokens": plain(size), "bytes": plain(size)}
    in_documents = tuple(f"document {number}" for number in documents)
    return Items("perplexity", language, "likelihood", names(len(nll)), columns, documents=in_documents)


def choice(right: Sequence[int], language: str = "fr", task: str = "xnli") -> Items:
    scores = tuple([1.0, 0.0] if one else [0.0, 1.0] for one in right)
    return Items(task, language, "choice", names(len(right)), {"scores": scores, "answer": (0,) * len(right)})


def value(values: Sequence[float] | Array, metric: str = "f1") -> Items:
    return Items("squad", "", "value", names(len(values)), {"value": plain(values)}, metric)


def translation(output: Sequence[str], reference: Sequence[str], pair: str = "fr-en") -> Items:
    columns = {"output": tuple(output), "reference": tuple(reference)}
    return Items("translation", pair, "translation", names(len(output)), columns)


def lines(seed: int, count: int, noise: float = 0.3, shift: float = 0.0) -> tuple[Array, Array, Array]:
    """Return the nats of two runs, and bytes: what makes a line hard is common to both."""
    draw = np.random.default_rng(seed)
    size = draw.integers(10, 200, count)
    nll_a = size * draw.gamma(4, 0.25, count)
    return nll_a, nll_a + size * draw.normal(shift, noise, count), size


def sentences(seed: int, count: int, wrong: float) -> tuple[list[str], list[str]]:
    """Return references, and outputs in which each word is another with the probability `wrong`."""
    draw = np.random.default_rng(seed)
    words = TEXT.split()
    reference = [draw.choice(words, size=draw.integers(3, 12)).tolist() for _ in range(count)]
    output = [[draw.choice(words) if draw.random() < wrong else word for word in line] for line in reference]
    return [" ".join(line) for line in reference], [" ".join(line) for line in output]


def runs_of_every_kind() -> list[Items]:
    nll, _, size = lines(7, 30)
    reference, output = sentences(8, 30, 0.3)
    return [
        likelihood(nll, size),
        choice([0, 1, 1] * 10),
        value(np.linspace(0, 1, 30)),
        translation(output, reference),
    ]


def of_languages(
    seed: int, codes: Sequence[str], count: int, documents: Sequence[int] | Array = ()
) -> tuple[list[Items], list[Items]]:
    """Return two runs on parallel lines: what pruning does to a line, it does in every language."""
    draw = np.random.default_rng(seed)
    harm = draw.gamma(1, 0.05, count)
    size = draw.integers(20, 200, (len(codes), count))
    nll = size * draw.gamma(9, 0.1, (len(codes), count))
    return (
        [likelihood(nll[i], size[i], code, documents) for i, code in enumerate(codes)],
        [likelihood(nll[i] + size[i] * harm, size[i], code, documents) for i, code in enumerate(codes)],
    )
