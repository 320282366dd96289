"""The log-likelihood of the scored tokens of a micro-batch, from the output of the last layer.

B: rows of a micro-batch. T: its tokens but the last. H: hidden width. N: scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlprune.data.batches import Batch
from mlprune.models.replay import ReplayModel


def row_likelihood(model: ReplayModel, batch: Batch, state_BTH: Tensor, logit_tokens: int, greedy: bool) -> Tensor:
    """Return each row's negative log-likelihood of its scored tokens, in nats: float64 [B], on the CPU.

    `greedy`: [B, 2]; the second column is 1 where every scored token is the likeliest one at its position, else 0.
    Logits are computed for scored tokens only, `logit_tokens` of them at a time.
    """
    predicts_BT = batch.scored_mask[:, :-1]  # position t predicts token t + 1; the last token was no input
    target_N = batch.input_ids[:, 1:][predicts_BT].to(state_BTH.device)
    state_NH = state_BTH[predicts_BT.to(state_BTH.device)]
    nll, missed = [], []
    for states, targets in zip(
        torch.split(state_NH, logit_tokens), torch.split(target_N, logit_tokens), strict=True
    ):
        logits = model.logits(states[None])[0].float()
        nll.append(cross_entropy(logits, targets, reduction="none"))  # five times as fast as logsumexp and gather
        if greedy:
            missed.append(logits.argmax(1) != targets)
    nll_B = _row_sums(predicts_BT, torch.cat(nll))
    return torch.stack([nll_B, _row_sums(predicts_BT, torch.cat(missed)) == 0], 1) if greedy else nll_B


def _row_sums(predicts_BT: Tensor, value_N: Tensor) -> Tensor:
    """Return for each row the sum over the positions that predict a scored token: float64 [B], on the CPU."""
    value_BT = torch.zeros(predicts_BT.shape, dtype=torch.float64)
    value_BT[predicts_BT] = value_N.double().cpu()
    return value_BT.sum(1)
