"""Agreement between languages about a layer's channels, by which `agreement` and `disagreement` allocate.

The signal only; what a layer drops because of it is in `allocation`. It is our own: M-Wanda (arXiv 2505.21171)
allocates by correlations between languages too, but its formula is not known to us.

L: languages. I: input channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

SPREAD = 0.16  # between the sparsest and the densest layer, as for owl


def matrix_agreements(sumsq_LI: Tensor) -> list[float]:
    """Return the correlation over channels of the norms at a matrix's input, for each pair of languages.

    `sumsq_LI` holds sums of squares over each language's monolingual text. A language's norms may have any scale:
    the correlation (Pearson's) is that of n_lj = s_lj / sqrt(mean_j s_lj^2) as well. A pair with a language whose
    norms are all equal (an expert that its text does not reach) has none.
    """
    norm_LI = sumsq_LI.double().sqrt()
    centred_LI = norm_LI - norm_LI.mean(1, keepdim=True)
    length_L1 = torch.linalg.vector_norm(centred_LI, dim=1, keepdim=True)
    varied = (length_L1[:, 0] > 0).tolist()
    correlation_LL = ((centred_LI @ centred_LI.T) / (length_L1 @ length_L1.T)).tolist()
    pairs = combinations(range(len(varied)), 2)
    return [correlation_LL[one][other] for one, other in pairs if varied[one] and varied[other]]


def layer_agreement(sumsqs_LI: Iterable[Tensor]) -> float:
    """Return the mean over a layer's matrices and pairs of languages; one if there is nothing to compare."""
    correlations = [value for sumsq_LI in sumsqs_LI for value in matrix_agreements(sumsq_LI)]
    return fmean(correlations) if correlations else 1.0
