"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): prunes a matrix and updates the weights that it keeps.

It goes through the columns from left to right. After each column it updates the columns to the right so that the
layer's output on the calibration text changes least. H is the Hessian of that change: 2 X X^T / n, with a
hundredth of its mean diagonal added to the diagonal. Departures from the authors' code:

- exactly floor(O * I * sparsity) weights are dropped; their `<=` drops one too many in every block;
- H is factorised in float64 and in one step (theirs: float32, factor, invert, factor again);
- the mean of the diagonal is taken before a channel that was always zero gets a diagonal of one, so that the
  result does not depend on the scale of H, which is per sequence in theirs and per token in ours;
- a Hessian that cannot be factorised is an error.

O: output channels (rows). I: input channels. C: the channels of one block.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from mlprune.pruning.masks import dropped_per_row, keep_all_but, keep_mask
from mlprune.pruning.moments import Moments
from mlprune.spec.variants import Pattern

BLOCK = 128
DAMPING = 0.01


class SingularHessianError(Exception):
    """The Hessian of a matrix is not positive definite, or not finite. The caller adds which matrix it is."""


def sparsegpt(
    weight_OI: Tensor, moments: Moments, sparsity: float | Fraction, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Return the mask, [O, I] bool, and the updated weights, [O, I] float32, which are +0 where dropped.

    Unstructured masks compare weights within a block of 128 columns; n:m masks compare within each group, after
    the columns before the group are done. `moments` must have a Gram matrix of at least one token. Weights of a
    channel that was always zero become zero. Raises SingularHessianError.
    """
    rows, width = weight_OI.shape
    hessian_II, dead_I = _hessian(moments)
    factor_II = _factor_of_inverse(hessian_II)
    # columns are updated one by one, so each is contiguous
    weight_IO = weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    weight_IO[dead_I] = 0
    keep_IO = torch.ones_like(weight_IO, dtype=torch.bool)
    # a group lies within one block
    step = max(1, BLOCK // pattern.group) * pattern.group if pattern.group else BLOCK
    for start in range(0, width, step):
        end = min(start + step, width)
        drop = dropped_per_row(rows * end, sparsity) - dropped_per_row(rows * start, sparsity)
        block = slice(start, end)
        error_CO = _prune_block(weight_IO[block], keep_IO[block], factor_II[block, block], drop, pattern)
        weight_IO[end:].addmm_(factor_II[block, end:].T, error_CO, alpha=-1)
    return keep_IO.T, weight_IO.T


def _hessian(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the damped H, float64, and which channels are dead, i.e. zero at every token."""
    assert moments.gram_II is not None, "the moments were gathered without a Gram matrix"
    assert moments.tokens, "without a token the caller prunes by |W|"
    hessian_II = moments.gram_II * (2 / moments.tokens)
    diagonal_I = hessian_II.diagonal()
    damping, dead_I = DAMPING * diagonal_I.mean(), diagonal_I == 0
    diagonal_I += damping
    diagonal_I[dead_I] = 1
    return hessian_II, dead_I


def _factor_of_inverse(hessian_II: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1, float32.

    If H with rows and columns reversed is L L^T, then U is the inverse of L, reversed in the same way. So H^-1
    itself is never computed.
    """
    lower_II, failed_at = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if int(failed_at) or not lower_II.diagonal().isfinite().all():
        raise SingularHessianError("the Hessian is not positive definite")
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
    return inverse_II.flip(0, 1).float()


def _prune_block(weight_CO: Tensor, keep_CO: Tensor, factor_CC: Tensor, drop: int, pattern: Pattern) -> Tensor:
    """Prune a block: change `weight_CO` and `keep_CO` in place. Return the errors, [C, O].

    The caller uses the errors to update the columns to the right of the block.
    """
    scale_C = factor_CC.diagonal()
    error_CO = torch.empty_like(weight_CO)
    if not pattern.group:
        keep_CO.copy_(keep_all_but(_cost(weight_CO, scale_C), drop).T)
    for column in range(len(weight_CO)):
        if pattern.group and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            keep_CO[group] = keep_mask(_cost(weight_CO[group], scale_C[group]), 0, pattern).T
        error_CO[column] = weight_CO[column].masked_fill(keep_CO[column], 0) / scale_C[column]
        weight_CO[column + 1 :].addr_(factor_CC[column, column + 1 :], error_CO[column], alpha=-1)
    weight_CO.masked_fill_(~keep_CO, 0)
    return error_CO


def _cost(weight_CO: Tensor, scale_C: Tensor) -> Tensor:
    """Return the cost of dropping each weight, after the weights to its right are updated, [O, C]."""
    return (weight_CO / scale_C[:, None]).square().T
