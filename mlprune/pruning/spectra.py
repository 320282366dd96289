"""Heavy tails of a layer's spectra, by which `alpha` allocates (AlphaPruning, Lu et al. 2024, arXiv 2410.10912).

The signal only, computed from weights without any text; what a layer drops because of it is in `allocation`.

O: output channels (rows). I: input channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import torch
from torch import Tensor

EPSILON = 0.3  # the authors' default: sparsities span [1 - EPSILON, 1 + EPSILON] times the requested one
ROWS = 4096  # that are multiplied at a time, to save memory
LARGEST = 1e9  # of an exponent, where the upper half of a spectrum is flat


def tail_exponent(weight_OI: Tensor) -> float | None:
    """Return the exponent of the power law of the tail of a matrix's squared singular values.

    It is Hill's estimate over the upper half of the spectrum: with k values, the smallest of them lambda_1,
    1 + k / sum of log(lambda_i / lambda_1). A smaller exponent is a heavier tail, the sign of a well-trained
    layer. None for a matrix of zeros.

    Departures from the authors' code: the squared singular values are the eigenvalues of W W^T or W^T W in
    float64 (theirs: singular values in float32); values that are zero in that precision are left out (theirs:
    log 0); the tail begins at the median, which is one of their settings (`xmin_mid`), not their default, for
    which a histogram of 100 bins and a search choose the beginning; the sparsities are shifted to their mean, not
    scaled (`allocation.linear_ratios`).
    """
    tall = weight_OI if weight_OI.shape[0] >= weight_OI.shape[1] else weight_OI.T
    square = weight_OI.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in torch.split(tall, ROWS):
        square += rows.double().T @ rows.double()
    spectrum = torch.linalg.eigvalsh(square)  # ascending
    spectrum = spectrum[spectrum > spectrum[-1] * len(spectrum) * torch.finfo(torch.float64).eps]
    if not len(spectrum):
        return None
    tail = spectrum[len(spectrum) // 2 :]
    mean_log = float((tail / tail[0]).log().mean())
    return 1 + 1 / max(mean_log, 1 / LARGEST)


def layer_exponent(weights_OI: Iterable[Tensor]) -> float:
    """Return the mean exponent of a layer's matrices; zero if all of them are zeros."""
    exponents = [exponent for weight_OI in weights_OI if (exponent := tail_exponent(weight_OI)) is not None]
    return fmean(exponents) if exponents else 0.0
