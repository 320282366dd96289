"""Rows of token ids in right-padded micro-batches, with content keys.

How text becomes rows is not decided here: see `calibration`, `heldout` and the tasks of `mlprune.evaluation`.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The size limit includes padding. It bounds the activations of a layer; smaller batches have less padding.
MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, right-padded."""

    input_ids: Tensor  # [B, T] int64
    lengths: tuple[int, ...]  # number of tokens of each row, without padding
    rows: tuple[int, ...]  # index of each row in its set: a prompt, a line or a row
    starts: tuple[int, ...] = ()  # index of each row's first scored token, at least 1; () means 1 for all rows

    @property
    def attention_mask(self) -> Tensor:
        """[B, T] int64: 1 for a token, 0 for padding."""
        positions_T = torch.arange(self.input_ids.shape[1])
        return (positions_T < torch.tensor(self.lengths)[:, None]).long()

    @property
    def scored_mask(self) -> Tensor:
        """[B, T] bool: the positions whose state predicts a scored token, which is the next token."""
        predicted_T = torch.arange(1, self.input_ids.shape[1] + 1)
        starts_B = torch.tensor(self.starts or [1] * len(self.rows))
        return (predicted_T >= starts_B[:, None]) & (predicted_T < torch.tensor(self.lengths)[:, None])

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class RowSet:
    """Token rows to score: the result for each row is the likelihood of its tokens from its start on.

    `key` is a content hash of the token ids, the batch layout and whatever else the results depend on: starts, or
    the lines that the rows come from.
    """

    count: int  # rows
    batches: tuple[Batch, ...]
    key: str


def build_row_set(
    rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int, pad_free: bool = False
) -> RowSet:
    """Lay out rows of token ids, each scored from its start on: at least 1, and before the row's end.

    `pad`: any id of the vocabulary, e.g. the one that `special_tokens.pad_id` returns. `pad_free`: see
    `micro_batches`.
    """
    assert all(1 <= start < len(row) for row, start in zip(rows, starts, strict=True))
    batches = tuple(
        replace(batch, starts=tuple(starts[row] for row in batch.rows))
        for batch in micro_batches(rows, pad, pad_free)
    )
    return RowSet(len(rows), batches, content_key(batches, starts))


def micro_batches(rows: Sequence[Sequence[int]], pad: int, pad_free: bool) -> tuple[Batch, ...]:
    """Put every row into one micro-batch. A batch has at most MICRO_BATCH_TOKENS, padding included, or one row.

    The longest rows come first, so that memory peaks at the start of a pass and not at its end. `pad_free`: a
    batch holds only rows of equal length. Mixture-of-experts models need that, because their router would send
    padding to the experts as if it were tokens.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda row: -len(rows[row])):
        longest = len(rows[groups[-1][0]]) if groups else 0
        full = not groups or (len(groups[-1]) + 1) * longest > MICRO_BATCH_TOKENS
        if full or (pad_free and len(rows[row]) < longest):
            groups.append([])
        groups[-1].append(row)
    return tuple(_padded_batch(rows, group, pad) for group in groups)


def _padded_batch(rows: Sequence[Sequence[int]], group: Sequence[int], pad: int) -> Batch:
    lengths = tuple(len(rows[row]) for row in group)
    padded = [[*rows[row], *[pad] * (lengths[0] - len(rows[row]))] for row in group]
    return Batch(torch.tensor(padded, dtype=torch.int64), lengths, tuple(group))


def content_key(batches: Sequence[Batch], extra: Sequence[object] = ()) -> str:
    """Return a content hash of the batches and of `extra` (JSON values): 32 hex digits, the same in every process.

    Stored moments and results are found by this key, so its input must not change.
    """
    layout = [[batch.rows, batch.lengths, batch.input_ids.tolist()] for batch in batches]
    return hashlib.sha256(json.dumps([layout, list(extra)]).encode()).hexdigest()[:32]
