"""Two runs, item by item: intervals against plain resampling, p against hand-made ones, what cannot be tested."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from numpy.typing import NDArray

from mlprune.evaluation import significance
from mlprune.evaluation.items import Items, metrics_of
from mlprune.evaluation.significance import (
    Difference,
    compare,
    family_of,
    gain,
    holm,
    mcnemar,
    mean_ratio_interval,
)

NAN, INF = math.nan, math.inf
Array = NDArray[Any]


def names(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def likelihood(nll: Sequence[float] | Array, size: Sequence[int] | Array, language: str = "fr") -> Items:
    columns = {"nll": nll, "tokens": size, "bytes": size}
    plain = {name: tuple(np.asarray(column).tolist()) for name, column in columns.items()}
    return Items("perplexity", language, "likelihood", names(len(nll)), plain)


def choice(right: Sequence[int], language: str = "fr", task: str = "xnli") -> Items:
    scores = tuple([1.0, 0.0] if one else [0.0, 1.0] for one in right)
    return Items(task, language, "choice", names(len(right)), {"scores": scores, "answer": (0,) * len(right)})


def value(values: Sequence[float] | Array, metric: str = "f1") -> Items:
    return Items("squad", "", "value", names(len(values)), {"value": tuple(np.asarray(values).tolist())}, metric)


def translation(output: Sequence[str], reference: Sequence[str]) -> Items:
    columns = {"output": tuple(output), "reference": tuple(reference)}
    return Items("translation", "fr-en", "translation", names(len(output)), columns)


def only(a: Items, b: Items) -> Difference:
    (found,) = compare([a], [b])
    return found


def drawn(items: int, stream: int = 0) -> Iterator[Array]:
    """The items of each resample."""
    draw = np.random.default_rng((significance.SEED, stream))
    return (draw.integers(items, size=items) for _ in range(significance.RESAMPLES))


def percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return low, high


def lines(seed: int, count: int, noise: float = 0.3, shift: float = 0.0) -> tuple[Array, Array, Array]:
    """Nats of two runs, and bytes: what makes a line hard is common to both."""
    draw = np.random.default_rng(seed)
    size = draw.integers(10, 200, count)
    nll_a = size * draw.gamma(4, 0.25, count)
    return nll_a, nll_a + size * draw.normal(shift, noise, count), size


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    significance._resamples.cache_clear()
    monkeypatch.setattr(significance, "RESAMPLES", 50)
    yield
    significance._resamples.cache_clear()


def test_bits_per_byte_against_plain_resampling() -> None:
    nll_a, nll_b, size = lines(0, 70)
    a, b = likelihood(nll_a, size), likelihood(nll_b, size)
    found = only(a, b)
    bits = [metrics_of([run])["bits_per_byte.fr"] for run in (a, b)]
    assert [found.a, found.b, found.difference] == [*bits, bits[1] - bits[0]]
    assert (found.task, found.language, found.metric, found.items) == ("perplexity", "fr", "bits_per_byte", 70)
    deltas = [
        nll_b[rows].sum() / size[rows].sum() / math.log(2) - nll_a[rows].sum() / size[rows].sum() / math.log(2)
        for rows in drawn(70)
    ]
    assert (found.low, found.high) == pytest.approx(percentiles(deltas), abs=1e-12)
    beyond = min(sum(delta <= 0 for delta in deltas), sum(delta >= 0 for delta in deltas))
    assert found.p == pytest.approx(2 * (beyond + 1) / 2001)
    assert 0.01 < found.p < 0.99, "a p at an end would say little"


def test_intervals_are_those_of_scipy() -> None:
    """Both draw 2,000 resamples, each its own: the ends differ by some hundredths of the width."""
    nll_a, nll_b, size = lines(1, 90, shift=0.05)
    found = only(likelihood(nll_a, size), likelihood(nll_b, size))

    def difference(nll_a: Array, nll_b: Array, size: Array, axis: int) -> Array:
        of_sums: Array = (nll_b.sum(axis) - nll_a.sum(axis)) / size.sum(axis) / math.log(2)
        return of_sums

    kwargs: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": 2000, "rng": 3}
    theirs = scipy.stats.bootstrap((nll_a, nll_b, size), difference, method="percentile", **kwargs)
    width = found.high - found.low
    assert abs(found.low - theirs.confidence_interval.low) < 0.06 * width
    assert abs(found.high - theirs.confidence_interval.high) < 0.06 * width


def test_the_same_runs_give_the_same_result() -> None:
    nll_a, nll_b, size = lines(2, 40)
    a, b = likelihood(nll_a, size), likelihood(nll_b, size)
    first = only(a, b)
    significance._resamples.cache_clear()
    assert only(a, b) == first
    back = only(b, a)
    assert back.p == first.p
    assert [back.low, back.high] == pytest.approx([-first.high, -first.low], rel=1e-12)


def test_intervals_hold_the_truth_and_p_rejects_as_often_as_it_says() -> None:
    """2,000 pairs of runs of 100 lines. Of 95%, 100 in 2,000 miss; four standard deviations are 39."""
    truth = 0.02 / math.log(2)
    held = rejected = 0
    for seed in range(2000):
        nll_a, nll_b, size = lines(seed, 100, shift=0.02)
        found = only(likelihood(nll_a, size), likelihood(nll_b, size))
        held += found.low <= truth <= found.high
        null = only(likelihood(nll_a, size), likelihood(nll_b - 0.02 * size, size))
        rejected += null.p < 0.05
    assert abs(2000 - held - 100) <= 39
    assert abs(rejected - 100) <= 39


def test_paired_is_narrower_than_unpaired() -> None:
    nll_a, nll_b, size = lines(3, 80, noise=0.05)
    found = only(likelihood(nll_a, size), likelihood(nll_b, size))
    one, other = list(drawn(80)), list(drawn(80, 1))
    apart = percentiles(
        [
            (nll_b[rows].sum() / size[rows].sum() - nll_a[others].sum() / size[others].sum()) / math.log(2)
            for rows, others in zip(one, other, strict=True)
        ]
    )
    assert found.high - found.low < (apart[1] - apart[0]) / 5


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(10, 1) == pytest.approx(2 * (1 + 11) / 2**11)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_accuracies_are_tested_on_the_items_that_one_run_alone_has_right() -> None:
    a = [1] * 30 + [0] * 30 + [1] * 1 + [0] * 10
    b = [1] * 30 + [0] * 30 + [0] * 1 + [1] * 10
    found = only(choice(a), choice(b))
    assert found.p == pytest.approx(2 * (1 + 11) / 2**11)
    assert found.metric == "accuracy"
    assert found.difference == pytest.approx(9 / 71)
    assert found.verdict == "better"
    deltas = [float((np.array(b)[rows] - np.array(a)[rows]).mean()) for rows in drawn(71)]
    assert (found.low, found.high) == pytest.approx(percentiles(deltas), abs=1e-12)
    assert only(value(a, "acc"), value(b, "acc")).p == found.p, "a harness task's 0 and 1 likewise"
    assert only(choice(b), choice(a)).verdict == "worse"


def test_other_values_are_tested_by_resampling() -> None:
    draw = np.random.default_rng(4)
    a = draw.uniform(size=60)
    b = a + draw.normal(0.05, 0.2, 60)
    found = only(value(a), value(b))
    deltas = [float((b[rows] - a[rows]).mean()) for rows in drawn(60)]
    assert (found.low, found.high) == pytest.approx(percentiles(deltas), abs=1e-12)
    assert found.p == pytest.approx(2 * (sum(delta <= 0 for delta in deltas) + 1) / 2001)
    assert found.metric == "f1"
    assert found.a == pytest.approx(a.mean())


@pytest.mark.parametrize(
    ("metric", "verdict"), [("f1", "better"), ("word_perplexity", "worse"), ("perplexity", "worse")]
)
def test_which_way_is_better_is_the_metrics(metric: str, verdict: str) -> None:
    values = np.linspace(0.2, 0.7, 20)
    assert only(value(values, metric), value(values + 0.1, metric)).verdict == verdict


TEXT = "the cat sat on a mat while it rained in north and south of town today"


def sentences(seed: int, count: int, wrong: float) -> tuple[list[str], list[str]]:
    """References, and outputs in which each word is another with the probability `wrong`."""
    draw = np.random.default_rng(seed)
    words = TEXT.split()
    reference = [draw.choice(words, size=draw.integers(3, 12)).tolist() for _ in range(count)]
    output = [[draw.choice(words) if draw.random() < wrong else word for word in line] for line in reference]
    return [" ".join(line) for line in reference], [" ".join(line) for line in output]


@pytest.mark.usefixtures("few_resamples")
def test_translations_against_plain_resampling() -> None:
    reference, output_a = sentences(5, 25, 0.2)
    _, output_b = sentences(5, 25, 0.25)
    output_a[3], output_b[4] = "", ""
    found = compare([translation(output_a, reference)], [translation(output_b, reference)])
    scorers: dict[str, Callable[..., Any]] = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}
    assert [each.metric for each in found] == list(scorers)
    for each, score in zip(found, scorers.values(), strict=True):
        whole = [score(output, [reference]).score for output in (output_a, output_b)]
        assert [each.a, each.b, each.difference] == [*whole, whole[1] - whole[0]]
        deltas = []
        for rows in drawn(25):
            texts = [[column[row] for row in rows] for column in (output_a, output_b, reference)]
            deltas.append(score(texts[1], [texts[2]]).score - score(texts[0], [texts[2]]).score)
        assert (each.low, each.high) == pytest.approx(percentiles(deltas), abs=1e-9)
        beyond = min(sum(delta <= 0 for delta in deltas), sum(delta >= 0 for delta in deltas))
        assert each.p == pytest.approx(2 * (beyond + 1) / 51)


def test_a_much_worse_translator_is_seen_in_both_metrics() -> None:
    reference, output_a = sentences(6, 40, 0.1)
    _, output_b = sentences(6, 40, 0.6)
    found = compare([translation(output_a, reference)], [translation(output_b, reference)])
    assert [each.verdict for each in found] == ["worse", "worse"]


def test_holm_by_hand() -> None:
    # 0.005 * 4; 0.01 * 3; 0.03 * 2; and 0.04 not below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    adjusted = holm([0.02, NAN, 0.01])
    assert math.isnan(adjusted[1])
    assert [adjusted[0], adjusted[2]] == [0.02, 0.02]


def test_holm_goes_over_the_languages_of_one_task() -> None:
    def right(extra: int) -> list[int]:
        return [1] * 20 + [0] * (10 - extra) + [1] * extra

    # 7, 6 and 0 items that b alone has right: p 2/128, 2/64, 1
    extra = {"en": 7, "fr": 6, "de": 0}
    a = [choice(right(0), code) for code in extra] + [choice(right(0), "en", "reviews")]
    b = [choice(right(more), code) for code, more in extra.items()] + [choice(right(6), "en", "reviews")]
    found = compare(a, b[::-1])
    assert [(each.task, each.language) for each in found] == [(each.task, each.language) for each in a]
    assert [each.p for each in found] == [2 / 128, 2 / 64, 1, 2 / 64]
    assert [each.adjusted for each in found] == [6 / 128, 4 / 64, 1, 2 / 64]
    assert [each.verdict for each in found] == ["better", "no difference shown", "no difference shown", "better"]


def test_a_harness_has_a_task_a_language_and_holm_goes_over_them() -> None:
    def harness(task: str, language: str, right: int) -> Items:
        values = (1.0,) * right + (0.0,) * (7 - right)
        return Items(task, language, "value", names(7), {"value": values}, "acc")

    tasks = (("xnli_en", "en"), ("xnli_fr", "fr"), ("arc_easy", ""))
    found = compare([harness(*task, 0) for task in tasks], [harness(*task, 7) for task in tasks])
    assert [family_of(each) for each in found] == [("xnli", "acc"), ("xnli", "acc"), ("arc_easy", "acc")]
    assert [each.adjusted for each in found] == [4 / 128, 4 / 128, 2 / 128]


def test_gain_is_upward_for_every_metric() -> None:
    assert gain(only(likelihood([2.0], [1]), likelihood([1.0], [1]))) == pytest.approx(1 / math.log(2))
    assert gain(only(choice([0, 0]), choice([1, 0]))) == 0.5
    assert gain(only(likelihood([2.0], [1]), likelihood([NAN], [1]))) == -INF


def runs_of_every_kind() -> list[Items]:
    nll, _, size = lines(7, 30)
    reference, output = sentences(8, 30, 0.3)
    return [
        likelihood(nll, size),
        choice([0, 1, 1] * 10),
        value(np.linspace(0, 1, 30)),
        translation(output, reference),
    ]


def test_a_run_does_not_differ_from_itself() -> None:
    run = runs_of_every_kind()
    for each in compare(run, run):
        assert (each.difference, each.low, each.high, each.p, each.adjusted) == (0, 0, 0, 1, 1)
        assert each.verdict == "no difference shown"


def test_one_item_shows_nothing() -> None:
    text = "The cat sat on the mat."
    a = [likelihood([2.0], [3]), choice([1]), value([0.1]), translation([text], [text])]
    b = [likelihood([1.0], [3]), choice([0]), value([0.9]), translation(["The cat sat on a mat."], [text])]
    for each in compare(a, b):
        assert each.difference != 0
        assert each.low == pytest.approx(each.difference)
        assert each.high == pytest.approx(each.difference)
        assert (each.p, each.items, each.verdict) == (1, 1, "no difference shown")


@pytest.mark.parametrize(("count", "p"), [(2, 0.5), (5, 0.0625), (6, 0.03125), (40, 2 / 2001)])
def test_equal_differences_are_as_rare_as_equal_signs(count: int, p: float) -> None:
    size = [16] * count
    found = only(likelihood([32.0] * count, size), likelihood([24.0] * count, size))
    assert found.low == found.high == pytest.approx(-0.5 / math.log(2), rel=1e-14)
    assert found.p == p
    assert found.verdict == ("better" if p < 0.05 else "no difference shown")


@pytest.mark.parametrize("broken", [NAN, INF])
def test_a_model_in_pieces_is_worse_and_not_tested(broken: float) -> None:
    sound = [likelihood([1.0, 2.0, 3.0], [4, 5, 6], code) for code in ("en", "fr")]
    pieces = [sound[0], likelihood([1.0, broken, 3.0], [4, 5, 6], "fr")]
    kept, lost = compare(sound, pieces)
    assert (kept.p, kept.adjusted, kept.verdict) == (1, 1, "no difference shown")
    assert repr([lost.b, lost.difference]) == repr([broken, broken])
    assert all(math.isnan(each) for each in (lost.low, lost.high, lost.p, lost.adjusted))
    assert lost.verdict == "worse"
    assert compare(pieces, sound)[1].verdict == "better"
    assert compare(pieces, pieces)[1].verdict == "no difference shown"
    assert only(value([0.5, broken]), value([0.5, 0.7])).verdict == "better"
    ratio, low, high = mean_ratio_interval(sound, pieces)
    assert repr(ratio) == repr(broken)
    assert math.isnan(low)
    assert math.isnan(high)


def test_scores_in_pieces_are_wrong_answers() -> None:
    a = choice([1] * 8)
    b = Items("xnli", "fr", "choice", a.ids, {"scores": ([NAN, 0.0],) * 8, "answer": (0,) * 8})
    assert only(a, b).verdict == "worse"
    assert only(a, b).p == 2 / 2**8


def test_common_items_are_compared_by_name() -> None:
    nll_a, nll_b, size = lines(9, 20)
    a, b = likelihood(nll_a, size), likelihood(nll_b, size)
    common = list(names(20)[5:15])
    expected = only(a.select(common), b.select(common))
    assert only(a.select(names(20)[:15]), b.select(names(20)[:4:-1])) == expected
    assert expected.items == 10
    assert expected != only(a, b)


def test_runs_that_cannot_be_compared_are_refused_by_name() -> None:
    a = [likelihood([1.0, 2.0], [3, 4], code) for code in ("en", "fr")]
    with pytest.raises(ValueError, match="perplexity fr: only one of the two runs"):
        compare(a, a[:1])
    with pytest.raises(ValueError, match="squad f1, perplexity en: only one of the two runs"):
        compare([value([0.5])], a[:1])
    with pytest.raises(ValueError, match="squad f1, squad acc: only one"):
        compare([value([0.5])], [value([0.5], "acc")])
    with pytest.raises(ValueError, match=r"perplexity en: .*no item in common"):
        compare([a[0].select(["0"])], [a[0].select(["1"])])
    with pytest.raises(ValueError, match=r"perplexity en: .*different texts"):
        compare(a, [likelihood([1.0, 2.0], [3, 5], "en"), a[1]])


def of_languages(seed: int, codes: Sequence[str], count: int) -> tuple[list[Items], list[Items]]:
    """Parallel lines: what pruning does to a line, it does in every language."""
    draw = np.random.default_rng(seed)
    harm = draw.gamma(1, 0.05, count)
    size = draw.integers(20, 200, (len(codes), count))
    nll = size * draw.gamma(9, 0.1, (len(codes), count))
    return (
        [likelihood(nll[i], size[i], code) for i, code in enumerate(codes)],
        [likelihood(nll[i] + size[i] * harm, size[i], code) for i, code in enumerate(codes)],
    )


def renamed(items: Items) -> Items:
    ids = tuple(f"{items.language} {one}" for one in items.ids)
    return Items(items.task, items.language, items.kind, ids, items.columns)


def plain_ratio(a: Sequence[Items], b: Sequence[Items], rows: Sequence[Array]) -> float:
    means = []
    for run in (a, b):
        columns = [[np.array(x.columns[name]) for name in ("nll", "bytes")] for x in run]
        means.append(np.mean([nll[r].sum() / size[r].sum() for (nll, size), r in zip(columns, rows, strict=True)]))
    return float(means[1] / means[0] - 1)


def test_the_mean_over_parallel_languages_resamples_lines_in_all_of_them() -> None:
    a, b = of_languages(10, ("en", "fr", "de"), 50)
    ratio, low, high = mean_ratio_interval(a, b)
    metrics_a, metrics_b = metrics_of(a), metrics_of(b)
    assert ratio == pytest.approx(metrics_b["bits_per_byte.mean"] / metrics_a["bits_per_byte.mean"] - 1, abs=1e-14)
    joint = [plain_ratio(a, b, [rows] * 3) for rows in drawn(50)]
    assert (low, high) == pytest.approx(percentiles(joint), abs=1e-12)


def test_other_languages_are_drawn_each_for_itself() -> None:
    a, b = of_languages(10, ("en", "fr", "de"), 50)
    parallel = mean_ratio_interval(a, b)
    a, b = ([run[0], run[1], renamed(run[2])] for run in (a, b))
    ratio, low, high = mean_ratio_interval(a, b)
    assert ratio == parallel[0]
    streams = zip(drawn(50, 0), drawn(50, 1), strict=True)
    assert (low, high) == pytest.approx(percentiles([plain_ratio(a, b, [x, x, y]) for x, y in streams]), abs=1e-12)
    # what harms a line harms it in every language: as if independent, the interval would be too narrow
    apart = mean_ratio_interval([renamed(x) for x in a], [renamed(x) for x in b])
    assert apart[2] - apart[1] < high - low < parallel[2] - parallel[1]


def test_a_mean_that_does_not_change_has_no_width() -> None:
    a, _ = of_languages(11, ("en", "fr"), 30)
    assert mean_ratio_interval([choice([1]), *a], [*a, choice([0])]) == (0, 0, 0)
