"""Splits of a budget by the losses of single layers: worked examples, and against a plain numerical search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlprune.pruning.sensitivity import REFERENCES, LossCurves, fit_curves, split_budget

SQUARES = 2.0  # an exponent with which splits are done by hand


def curves(*scales: list[float], exponent: float = SQUARES) -> LossCurves:
    return LossCurves(np.array(scales), exponent)


def test_worked_example_of_the_mean() -> None:
    # r^2 and 3 r^2: the derivatives 2 r and 6 r are equal at 0.75 and 0.25
    assert split_budget(curves([1.0], [3.0]), [7, 7], 0.5, worst=False) == pytest.approx((0.75, 0.25), abs=1e-12)
    # the mean of two languages is that of their mean curves
    mixed = curves([0.5, 1.5], [4.0, 2.0])
    assert split_budget(mixed, [7, 7], 0.5, worst=False) == pytest.approx((0.75, 0.25), abs=1e-12)
    # a weight of a layer three times as large costs a third: 2 r / 3 = 2 r'; 3 r + r' = 2
    assert split_budget(curves([1.0], [1.0]), [3, 1], 0.5, worst=False) == pytest.approx((0.6, 0.2), abs=1e-12)


def test_worked_example_of_the_worst_language() -> None:
    # the first language needs layer 0, the second layer 1, and they are alike: neither is favoured
    alike = curves([3.0, 1.0], [1.0, 3.0])
    assert split_budget(alike, [1, 1], 0.5, worst=True) == pytest.approx((0.5, 0.5), abs=1e-6)
    # the second always loses more, so only its curve counts
    one_suffers = curves([1.0, 10.0], [3.0, 30.0])
    assert split_budget(one_suffers, [1, 1], 0.5, worst=True) == pytest.approx((0.75, 0.25), abs=1e-6)


def test_a_layer_at_the_ceiling_is_compensated_by_the_others() -> None:
    # 0.35 is kept on the mean, so each keeps 0.175; what is left of 1.95 is split in the proportion 2 to 1
    ratios = split_budget(curves([1.0], [4.0], [8.0]), [1, 1, 1], 0.65, worst=False)
    assert ratios == pytest.approx((0.825, 0.75, 0.375), abs=1e-12)


def test_nothing_is_dropped_at_sparsity_zero() -> None:
    assert split_budget(curves([1.0, 2.0], [3.0, 1.0]), [1, 2], 0.0, worst=True) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4), st.floats(1.5, 8), st.integers(50, 950))
def test_no_other_split_has_a_smaller_loss(
    seed: int, layers: int, languages: int, exponent: float, mille: int
) -> None:
    generator = np.random.default_rng(seed)
    scale_LK = generator.lognormal(0, 1, (layers, languages))
    weights, sparsity = generator.integers(1, 100, layers), mille / 1000
    share_L = weights / weights.sum()
    for worst in (False, True):
        ratios = np.array(
            split_budget(LossCurves(scale_LK, exponent), weights.tolist(), sparsity, worst), dtype=float
        )
        assert share_L @ ratios == pytest.approx(sparsity, abs=1e-12)
        assert ratios.min() >= 0
        assert ratios.max() <= (1 + sparsity) / 2

        def loss(split: np.ndarray, worst: bool = worst) -> float:
            by_language = scale_LK.T @ split**exponent
            return float(by_language.max() if worst else by_language.mean())

        for _ in range(30):  # weights of one layer are exchanged for as many of another
            one, other = generator.choice(layers, 2, replace=False)
            changed = ratios.copy()
            step = generator.choice([1e-3, 1e-2, 0.1])
            changed[one] += step / share_L[one]
            changed[other] -= step / share_L[other]
            if changed.min() >= 0 and changed.max() <= (1 + sparsity) / 2:
                assert loss(changed) >= loss(ratios) * (1 - 1e-6)


# curves


def test_curves_are_fitted_exactly_to_power_laws() -> None:
    scale_LK = np.array([[1.0, 2.0], [0.5, 0.4], [3.0, 1.0]])
    losses = np.stack([scale_LK * reference**3.3 for reference in REFERENCES])
    fitted = fit_curves(losses)
    assert fitted.exponent == pytest.approx(3.3, abs=1e-12)
    assert fitted.scale_LK == pytest.approx(scale_LK, rel=1e-12)


def test_noise_makes_no_layer_free_and_no_curve_concave() -> None:
    losses = np.array([[[0.1], [-0.02], [0.3]], [[0.09], [0.01], [0.28]]])
    fitted = fit_curves(losses)
    assert fitted.exponent == 1.01
    powers = np.array(REFERENCES) ** 1.01
    scale_L = (powers[0] * losses[0, :, 0] + powers[1] * losses[1, :, 0]) / (powers**2).sum()
    assert scale_L[1] < 0.1 * scale_L.mean()
    assert fitted.scale_LK[:, 0] == pytest.approx([scale_L[0], 0.1 * scale_L.mean(), scale_L[2]], rel=1e-12)
    ratios = split_budget(fitted, [1, 1, 1], 0.5, worst=True)
    assert all(0 <= ratio <= 0.75 for ratio in ratios)
    nothing = fit_curves(np.zeros((2, 3, 2)))
    assert split_budget(nothing, [1, 1, 1], 0.5, worst=True) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
