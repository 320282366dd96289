"""What the model tells of the scored tokens of a micro-batch, from what left its last layer.

B: rows of a micro-batch. T: its tokens but the last. H: hidden width. N: scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlprune.data.batches import Batch
from mlprune.models.replay import ReplayModel


def row_likelihood(model: ReplayModel, batch: Batch, state_BTH: Tensor, logit_tokens: int, greedy: bool) -> Tensor:
    """Of each row's scored tokens the negative log-likelihood in nats, float64 [B], on the CPU.

    `greedy`: [B, 2]; beside it, 1 where each of them is the likeliest at its place, else 0. Logits are made for
    `logit_tokens` tokens at a time, and for no token that is not scored.
    """
    tells_BT = batch.scored_mask[:, :-1]  # position t tells token t + 1; the last token was not given
    target_N = batch.input_ids[:, 1:][tells_BT].to(state_BTH.device)
    state_NH = state_BTH[tells_BT.to(state_BTH.device)]
    nll, missed = [], []
    for states, targets in zip(
        torch.split(state_NH, logit_tokens), torch.split(target_N, logit_tokens), strict=True
    ):
        logits = model.logits(states[None])[0].float()
        nll.append(cross_entropy(logits, targets, reduction="none"))  # five times faster than logsumexp
        if greedy:
            missed.append(logits.argmax(1) != targets)
    told = _row_sums(tells_BT, torch.cat(nll))
    return torch.stack([told, _row_sums(tells_BT, torch.cat(missed)) == 0], 1) if greedy else told


def _row_sums(tells_BT: Tensor, value_N: Tensor) -> Tensor:
    """Of each row, the sum over the positions that tell, float64 [B], on the CPU."""
    value_BT = torch.zeros(tells_BT.shape, dtype=torch.float64)
    value_BT[tells_BT] = value_N.double().cpu()
    return value_BT.sum(1)
