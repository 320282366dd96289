"""Two runs, item by item: p against hand-made ones, verdicts, and what cannot be tested."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from mlprune.evaluation.estimates import estimate
from mlprune.evaluation.items import Items, metrics_of
from mlprune.evaluation.resampling import metric_samples
from mlprune.evaluation.significance import (
    Difference,
    compare,
    family_of,
    gain,
    holm,
    mcnemar,
)
from tests.runs import (
    choice,
    likelihood,
    lines,
    names,
    runs_of_every_kind,
    sentences,
    translation,
    value,
)

NAN, INF = math.nan, math.inf


def only(a: Items, b: Items) -> Difference:
    (found,) = compare([a], [b])
    return found


def test_values_are_metrics_and_interval_and_p_are_estimates() -> None:
    nll_a, nll_b, size = lines(0, 70)
    documents = np.arange(70) // 6
    a, b = likelihood(nll_a, size, "fr", documents), likelihood(nll_b, size, "fr", documents)
    found = only(a, b)
    bits = [metrics_of([run])["bits_per_byte.fr"] for run in (a, b)]
    assert [found.a, found.b, found.difference] == [*bits, bits[1] - bits[0]]
    assert (found.task, found.language, found.metric, found.items) == ("perplexity", "fr", "bits_per_byte", 70)
    samples_a, samples_b = (metric_samples([run], ["bits_per_byte.fr"])["bits_per_byte.fr"] for run in (a, b))
    expected = estimate([samples_b], 12, [samples_a])
    assert (found.low, found.high, found.p) == (expected.low, expected.high, expected.p)
    assert found.low < found.difference < found.high


def test_the_same_runs_give_the_same_result() -> None:
    nll_a, nll_b, size = lines(2, 40)
    a, b = likelihood(nll_a, size), likelihood(nll_b, size)
    back = only(b, a)
    first = only(a, b)
    assert only(a, b) == first
    assert back.p == first.p
    assert [back.low, back.high] == [-first.high, -first.low]


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
    assert only(value(a, "acc"), value(b, "acc")).p == found.p, "a harness task's 0 and 1 likewise"
    assert only(choice(b), choice(a)).verdict == "worse"


def test_right_answers_in_documents_are_not_independent() -> None:
    """Ten answers of one document are one difference, not ten."""
    a, b = [0] * 20 + [1] * 20, [1] * 10 + [0] * 10 + [1] * 20
    alone = only(value(a, "acc"), value(b, "acc"))
    assert alone.verdict == "better"
    documents = tuple(str(n // 10) for n in range(40))
    found = only(*(replace(value(right, "acc"), documents=documents) for right in (a, b)))
    # the four documents differ by 1, 0, 0, 0: mean 1/4, standard error 1/4
    assert found.p == pytest.approx(scipy.stats.ttest_1samp([1, 0, 0, 0], 0).pvalue, rel=0.05)
    assert found.verdict == "no difference shown"


def test_other_values_are_tested_by_resampling() -> None:
    draw = np.random.default_rng(4)
    a = draw.uniform(size=60)
    b = a + draw.normal(0.05, 0.2, 60)
    found = only(value(a), value(b))
    expected = scipy.stats.ttest_rel(b, a)
    assert found.p == pytest.approx(expected.pvalue, rel=0.1)
    low, high = expected.confidence_interval()
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.03 * (high - low))
    assert found.metric == "f1"
    assert found.a == pytest.approx(a.mean())


@pytest.mark.parametrize(
    ("metric", "verdict"), [("f1", "better"), ("word_perplexity", "worse"), ("perplexity", "worse")]
)
def test_which_way_is_better_is_the_metrics(metric: str, verdict: str) -> None:
    values = np.linspace(0.2, 0.7, 20)
    assert only(value(values, metric), value(values + 0.1, metric)).verdict == verdict


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
        assert (each.low, each.high) == (-INF, INF)
        assert (each.p, each.items, each.verdict) == (1, 1, "no difference shown")


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
