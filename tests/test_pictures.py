"""What a person sees of a finished sweep: its pictures. Tables and texts are in test_sweep_report."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mlprune.analysis import claim_picture, trade_off
from mlprune.analysis.claim_picture import ClaimPoint, draw_claims
from mlprune.analysis.dot_plot import draw_dot_plot, language_colors
from mlprune.analysis.figures import short_names
from mlprune.analysis.forecast_picture import draw_forecasts
from mlprune.analysis.heat_map import colour_limits, draw_heat_map, losses, percent_text
from mlprune.analysis.sweep_pictures import draw_pictures
from mlprune.analysis.trade_off import draw_trade_off, pareto_front, spread
from mlprune.evaluation.estimates import Estimate
from mlprune.evaluation.forecasts import forecast_correlation, with_forecasts
from mlprune.evaluation.loss import loss_metrics
from mlprune.spec.variants import Propagation, Variant
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant

CODES = ("en", "fr", "de", "es", "hi", "sw", "zh", "ar", "ru", "tr", "vi", "th", "el", "ur")
MIX = "mix:mono:hi=0.5,translation:en-sw=0.5"


def result(variant: Variant | None, bits: dict[str, float], dense: Result | None = None) -> Result:
    metrics = {f"bits_per_byte.{code}": value for code, value in bits.items()}
    metrics |= {"bits_per_byte.mean": sum(bits.values()) / len(bits), "bits_per_byte.worst": max(bits.values())}
    metrics |= loss_metrics(metrics, dense.metrics) if dense else {}
    sparsity = {"sparsity.actual": variant.sparsity if variant else 0.0}
    return Result(variant.key if variant else "dense", variant, metrics | sparsity)


def wanda(
    calibration: str, sparsity: float = 0.5, score: str = "wanda", propagation: Propagation = "dense"
) -> Variant:
    return parse_variant(calibration, score, sparsity, "unstructured", propagation)


def trials(
    languages: Sequence[str], calibrations: Sequence[str], sparsities: Sequence[float]
) -> tuple[Result, list[Result]]:
    """The dense model, and a trial of each calibration at each sparsity, the best mean first."""
    random.seed(0)
    dense = result(None, {code: random.uniform(0.7, 1.5) for code in languages})
    base = {code: dense.metrics[f"bits_per_byte.{code}"] for code in languages}
    made = [
        result(wanda(text, sparsity), {c: base[c] * (1 + sparsity * random.random()) for c in languages}, dense)
        for text in calibrations
        for sparsity in sparsities
    ]
    return dense, sorted(made, key=lambda one: one.metrics["loss.mean"])


def broken(found: Result, value: float) -> Result:
    metrics = {k: value if k.startswith(("bits", "loss")) else v for k, v in found.metrics.items()}
    return replace(found, metrics=metrics)


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 50, "empty"
        return picture.size


# Pareto front


def at(mean: float, worst: float, number: int) -> Result:
    return Result(str(number), None, {"loss.mean": mean, "loss.worst": worst})


def test_pareto_front_is_what_nothing_beats() -> None:
    draw = random.Random(1)
    values = [*range(6), math.nan, math.inf]
    for _ in range(300):
        points = [(draw.choice(values), draw.choice(values)) for _ in range(draw.randrange(12))]
        finite = [point for point in points if all(map(math.isfinite, point))]

        def beaten(point: tuple[float, float], others: Sequence[tuple[float, float]] = finite) -> bool:
            return any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in others)

        expected = sorted(point for point in finite if not beaten(point))
        front = pareto_front([at(x, y, n) for n, (x, y) in enumerate(points)])
        assert [(one.metrics["loss.mean"], one.metrics["loss.worst"]) for one in front] == expected
        assert len({one.key for one in front}) == len(front)


# the heat map


def test_heat_map_holds_changes_in_percent_the_best_mean_first() -> None:
    dense = result(None, {"en": 1.0, "fr": 2.0})
    worse = result(wanda("mono:en"), {"en": 1.1, "fr": 3.0}, dense)
    better = result(wanda("mono:fr"), {"en": 1.5, "fr": 1.9}, dense)
    gone = broken(result(wanda("code"), {"en": 1.0, "fr": 1.0}, dense), math.nan)
    keys, loss_NC = losses([gone, worse, better], ("en", "fr"))
    assert keys == [better.key, worse.key, gone.key]
    np.testing.assert_allclose(loss_NC, [[22.5, 50.0, -5.0], [30.0, 10.0, 50.0], 3 * [math.nan]], rtol=1e-12)


def test_one_huge_value_leaves_the_colours_of_the_others() -> None:
    usual = np.linspace(10, 30, 21)
    assert colour_limits(usual) == (10, 30)
    low, high = colour_limits(np.array([*usual, 1e9, math.nan, math.inf]))
    assert low == 10
    assert 30 <= high < 100
    assert colour_limits(np.array([5.0, 5.5])) == (5.0, 7.0), "what is alike looks alike"
    assert colour_limits(np.array([math.nan])) == (0.0, 2.0)
    assert colour_limits(np.array([4.0, 4.0, 4.0, 90.0])) == (4.0, 90.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "+0.0"),
        (-3.14, "-3.1"),
        (9.96, "+10"),
        (147.6, "+148"),
        (2.4e6, "+2e6"),
        (3e12, "+3e12"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_figures_fit_into_a_cell(value: float, text: str) -> None:
    assert percent_text(value) == text


def test_names_leave_out_what_all_have_in_common() -> None:
    def names(*variants: Variant) -> list[str]:
        return list(short_names([result(variant, {"en": 1.0}) for variant in variants]).values())

    assert names(wanda("mono:en"), wanda("mono:fr", 0.3)) == ["mono:en", "mono:fr"]
    assert names(wanda("mono:en"), wanda("mono:en", score="ria")) == ["wanda", "ria"]
    magnitude = parse_variant(None, "magnitude", 0.5, "unstructured", "dense")
    sequential = wanda("code", propagation="sequential")
    assert names(magnitude, wanda("code"), sequential) == ["magnitude", "wanda code", "wanda code sequential"]
    half = parse_variant("code", "wanda", 0.5, "2:4", "dense")
    assert names(half, wanda("code")) == ["2:4", "wanda"]
    assert names(wanda("code")) == ["wanda"]


# the trade


def test_labels_are_apart_and_within() -> None:
    draw = random.Random(2)
    for _ in range(200):
        wanted = sorted((draw.uniform(-0.1, 1.1) for _ in range(draw.randrange(1, 9))), reverse=True)
        heights = spread(wanted, 0.06)
        assert all(-1e-9 <= height <= 1 + 1e-9 for height in heights)
        assert all(a - b >= 0.06 - 1e-9 for a, b in pairwise(heights))
    assert spread([0.9, 0.5, 0.1], 0.06) == [0.9, 0.5, 0.1], "where there is room nothing moves"


def test_labels_go_to_every_sparsity_first() -> None:
    fronts = {0.3: [at(n, 9 - n, n) for n in range(9)], 0.5: [at(1, 1, 10)], 0.7: [at(3, 2, 20), at(2, 3, 21)]}
    labelled = [int(one.key) for one in trade_off._trials_to_label(fronts.values())]
    assert labelled == [0, 10, 21, 8, 20, 1, 2, 3]


# which pictures


def test_pictures_of_a_large_sweep(tmp_path: Path) -> None:
    calibrations = (
        [f"mono:{code}" for code in CODES[:9]] + [f"translation:en-{code}" for code in CODES[1:11]] + [MIX]
    )
    _, results = trials(CODES, calibrations, [0.5])
    heat, trade = tmp_path / "new" / "heat.png", tmp_path / "trade.png"
    draw_heat_map(results, CODES, "large", heat)
    width, height = size(heat)
    assert 1200 < width < 2000, "15 columns of figures, not shrunk when it is looked at"
    assert 800 < height < 1200
    broke = [broken(results[0], math.nan), broken(results[1], 1e6), *results[2:]]
    draw_trade_off(broke, "large", trade, {one.key: Estimate(0.2, 0.1, 0.3, 0.0) for one in broke})
    assert size(trade) == (1650, 1050)


def test_pictures_that_say_nothing_are_not_drawn(tmp_path: Path) -> None:
    def names(languages: Sequence[str], calibrations: Sequence[str], sparsities: Sequence[float]) -> list[str]:
        dense, results = trials(languages, calibrations, sparsities)
        files = draw_pictures(dense, results, languages, "t$1_2$: x", tmp_path, "s")
        assert all(min(size(file)) > 200 for file in files)
        return [file.name for file in files]

    assert names(["en", "fr"], ["mono:en", "mono:fr"], [0.5]) == [
        "s.png",
        "s-calibrations.png",
        "s-losses.png",
        "s-languages.png",
    ]
    assert names(["en", "fr"], ["mono:en"], [0.3, 0.5]) == ["s.png", "s-languages.png"]
    assert names(["en", "fr"], ["mono:en"], [0.3]) == ["s.png"]
    assert names(["en"], ["mono:en", "mono:fr"], [0.3]) == ["s.png"]


def forecast_trials(
    languages: Sequence[str], sparsities: Sequence[float] = (0.3, 0.5)
) -> tuple[Result, list[Result]]:
    """Trials of three scores and two texts whose forecast of each language is its loss to the power 1.5."""
    dense, results = trials(languages, ["mono:en", "mono:fr"], sparsities)
    texts = [(one, score) for one in results for score in ("wanda", "ria", "sparsegpt")]
    made = []
    for one, score in texts:
        assert one.variant is not None
        variant = parse_variant(str(one.variant.calibration), score, one.variant.sparsity, "unstructured", "dense")
        bits = {code: one.metrics[f"bits_per_byte.{code}"] * random.uniform(1, 1.2) for code in languages}
        changed = result(variant, bits, dense)
        loss = loss_metrics(changed.metrics, dense.metrics)
        forecasts = {name.replace("loss", "forecast"): value**1.5 for name, value in loss.items()}
        made.append(replace(changed, metrics={**changed.metrics, **forecasts}))
    return dense, made


def test_forecasts_that_order_trials_rightly_have_a_correlation_of_one() -> None:
    dense, results = forecast_trials(["en", "fr"])
    for name in ("en", "fr", "mean", "worst"):
        assert forecast_correlation(dense, results, name) == pytest.approx(1)
        inverse = [replace(one, metrics={**one.metrics, f"forecast.{name}": -i}) for i, one in enumerate(results)]
        ranks = sorted(results, key=lambda one: loss_metrics(one.metrics, dense.metrics)[f"loss.{name}"])
        squares = sum((len(results) - 1 - i - ranks.index(one)) ** 2 for i, one in enumerate(results))
        by_hand = 1 - 6 * squares / (len(results) * (len(results) ** 2 - 1))
        assert forecast_correlation(dense, inverse, name) == pytest.approx(by_hand)
    assert math.isnan(forecast_correlation(dense, results[:2], "en"))
    assert math.isnan(forecast_correlation(dense, [results[0]] * 5, "en"))
    gone = [broken(results[0], math.nan), broken(results[1], math.inf), *results[2:]]
    assert forecast_correlation(dense, gone, "en") == pytest.approx(1)


def test_forecasts_are_drawn_for_four_trials_or_more(tmp_path: Path) -> None:
    dense, results = forecast_trials(["en", "fr"])
    plain = [
        replace(one, metrics={k: v for k, v in one.metrics.items() if "forecast" not in k}) for one in results
    ]
    unmeasured = [
        replace(one, metrics={k: v for k, v in one.metrics.items() if "forecast" in k or "sparsity" in k})
        for one in results
    ]
    assert with_forecasts([*plain, *results[:2], *unmeasured]) == results[:2]
    for count in (0, 3, 4):
        files = draw_pictures(dense, [*results[:count], *plain[count:]], ["en", "fr"], "t", tmp_path, "s")
        assert ("s-forecasts.png" in [file.name for file in files]) == (count >= 4)


def test_the_picture_of_forecasts_has_a_panel_per_language(tmp_path: Path) -> None:
    dense, results = forecast_trials(CODES[:5], [0.3, 0.4, 0.5, 0.6, 0.7])
    gone = [broken(results[0], math.nan), broken(results[1], 1e6), *results[2:]]
    draw_forecasts(dense, gone, CODES[:5], "forecasts", tmp_path / "s.png")
    width, height = size(tmp_path / "s.png")
    assert width == round(3 * 4.2 * 150)
    assert height == round((2 * 3.5 + 1.4) * 150)


def test_the_dot_plot_has_a_colour_for_every_language() -> None:
    for count in (2, 10, 11, 30):
        colors = language_colors([f"language {n}" for n in range(count)])
        assert len({tuple(color) for color in colors.values()}) == len(colors) == count


def test_the_dot_plot_has_a_panel_per_sparsity_and_a_row_per_variant(tmp_path: Path) -> None:
    _, results = trials(CODES[:6], [f"mono:{code}" for code in CODES[:5]], [0.3, 0.5, 0.7])
    gone = [broken(results[0], math.nan), broken(results[1], 1e6), *results[2:]]
    draw_dot_plot(gone, CODES[:6], "losses", tmp_path / "s.png")
    rows, width = 5, 4.2 + 0.075 * len("mono:en")
    assert size(tmp_path / "s.png") == (int(2 * width * 150), int((2 * (0.24 * rows + 0.7) + 0.9) * 150))


def test_models_pruned_to_pieces_have_pictures_too(tmp_path: Path) -> None:
    dense, results = trials(["en", "fr"], ["mono:en", "mono:fr"], [0.5])
    for value in (math.nan, math.inf):
        files = draw_pictures(dense, [broken(one, value) for one in results], ["en", "fr"], "gone", tmp_path, "s")
        assert [file.name for file in files] == ["s.png", "s-calibrations.png"]


def test_the_picture_of_claims_has_an_interval_for_each_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(claim_picture, "write_png", lambda figure, title, file: drawn.append(figure))
    points = [
        ClaimPoint("text is better", 0.3, Estimate(-0.02, -0.03, -0.01, 0.0), True),
        ClaimPoint("text is better", 0.5, Estimate(-0.5, -0.6, -0.4, 0.0), True),
        ClaimPoint("direction matters", 0.3, Estimate(0.001, -0.01, 0.012, 0.8), False),
    ]
    draw_claims(points, "claims", tmp_path / "c.png")
    panel: Any = drawn[0].axes[0]
    markers = [line for line in panel.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in markers] == pytest.approx([-2.0, -50.0, 0.1])
    assert [isinstance(line.get_markerfacecolor(), str) for line in markers] == [False, False, True]
    ends = [tuple(lines.get_segments()[0][:, 0]) for lines in panel.collections]
    assert np.allclose(ends, [(-3, -1), (-60, -40), (-1, 1.2)])
    rows = [line.get_ydata()[0] for line in markers]
    assert rows[0] < rows[1] < 0.5 < rows[2], "sparsities of a claim are side by side, claims below each other"
    assert [text.get_text() for text in panel.get_xticklabels()] == ["-30", "-10", "-3", "-1", "0", "+1", "+3"]
