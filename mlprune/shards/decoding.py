"""Greedy continuation of prompts, token by token, with keys and values kept by the shards.

Prompts are cut into groups of similar lengths. A group's rows share a cache, in which their last tokens stand side
by side: so the prompts pass in micro-batches of few rows, and later the newest tokens of all rows in one, which
takes a layer's weights through the processor once. Groups go in waves, as many at once as there is room for. How
groups are cut depends on the prompts alone, not on shards, ranks or waves.

B: rows. T: tokens of a step. S: T and the positions before. H: hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlprune.data.batches import MICRO_BATCH_TOKENS
from mlprune.models.cache import KeyValues, Past
from mlprune.models.replay import Call, ReplayModel
from mlprune.models.residency import Ranks, Residency, Resident, masked_by
from mlprune.pruning.masks import LayerMasks

# positions that a shard keeps keys and values of at a time, pads and tokens to come included; at least one row's
CACHED_TOKENS = 2**14
# of a group, all of which one rank continues: more of them cost little more time, but several ranks want groups
GROUP_ROWS = 32
PAD = 0  # any id that is in the vocabulary will do: no token attends to a pad

Ended = Callable[[int, Sequence[int]], bool]  # row, its new tokens


@dataclass(frozen=True, eq=False)
class Step:
    """What a group is given next: its prompts, left-padded, or each row's newest token."""

    group: int  # its number
    input_ids: Tensor  # [B, T] int64
    pads: tuple[int, ...]  # before each row's first token
    seen: int  # positions before these
    room: int  # positions in the end

    @property
    def attention_mask(self) -> Tensor:
        """[B, S] int64: 0 for a pad."""
        positions_S = torch.arange(self.seen + self.input_ids.shape[1])
        return (positions_S >= torch.tensor(self.pads)[:, None]).long()

    def parts(self) -> Iterator[slice]:
        """The rows of each micro-batch."""
        rows, tokens = self.input_ids.shape
        at_once = max(1, MICRO_BATCH_TOKENS // tokens)
        return (slice(start, start + at_once) for start in range(0, rows, at_once))


class Group:
    """Rows that are continued together, as the driver sees them: longest prompt first."""

    def __init__(self, number: int, rows: Sequence[int], prompts: Sequence[Sequence[int]], max_new: int) -> None:
        self.number = number
        self.written: dict[int, list[int]] = {row: [] for row in rows}
        self._prompts = [list(prompts[row]) for row in rows]
        self._max_new = max_new
        self._open = set(rows)
        self._newest: Sequence[int] = ()  # of each row, also of those that have ended
        self._steps = 0

    @property
    def room(self) -> int:
        """Positions of a row in the end; the last token is told, not given."""
        return len(self._prompts[0]) + self._max_new - 1

    @property
    def open(self) -> int:
        """Rows that have not ended."""
        return len(self._open)

    def step(self) -> Step:
        longest = len(self._prompts[0])
        pads = tuple(longest - len(prompt) for prompt in self._prompts)
        if self._steps:
            ids, seen = [[token] for token in self._newest], longest + self._steps - 1
        else:
            ids, seen = [[PAD] * n + prompt for n, prompt in zip(pads, self._prompts, strict=True)], 0
        return Step(self.number, torch.tensor(ids), pads, seen, self.room)

    def take(self, tokens: Sequence[int], ended: Ended) -> None:
        """Each row's next token."""
        self._newest, self._steps = tokens, self._steps + 1
        for (row, written), token in zip(self.written.items(), tokens, strict=True):
            if row in self._open:
                written.append(token)
                if ended(row, written) or len(written) == self._max_new:
                    self._open.remove(row)


def kept_at_once(rows: int, longest: int) -> int:
    """Positions that are kept at a time at most, of so many rows of so many tokens."""
    return min(rows * longest, max(CACHED_TOKENS, longest))


def grouped(prompts: Sequence[Sequence[int]], max_new: int) -> list[Group]:
    """All rows in groups, longest prompts first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        rows = len(groups[-1]) if groups else GROUP_ROWS
        if rows == GROUP_ROWS or (rows + 1) * (len(prompts[groups[-1][0]]) + max_new) > CACHED_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [Group(number, rows, prompts, max_new) for number, rows in enumerate(groups)]


def waves(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Consecutive groups whose keys and values are kept at the same time."""
    wave: list[Group] = []
    for group in groups:
        if sum(len(other.written) * other.room for other in (*wave, group)) > CACHED_TOKENS and wave:
            yield wave
            wave = []
        wave.append(group)
    if wave:
        yield wave


class Session:
    """One rank's side of a wave: what its groups have behind them, until the wave ends.

    To mask a layer anew for each token takes longer than the token. So of layers that are always here, masked
    copies are kept as well; for copies of those that are elsewhere there is no room.
    """

    def __init__(
        self, model: ReplayModel, residency: Residency, ranks: Ranks, masks: Mapping[int, LayerMasks] | None
    ) -> None:
        self._model, self._residency, self._ranks, self._masks = model, residency, ranks, masks
        self._copies: dict[int, nn.Module] = {}
        if masks is not None and isinstance(residency, Resident):
            self._copies = {index: _masked_copy(residency, index, masks[index]) for index in model.span.layers}
            self._residency, self._masks = Resident(self._copies), None
        self._kept: dict[int, KeyValues] = {}

    def close(self) -> None:
        """Let go of all that is kept, at once: experts and what runs them hold each other."""
        self._kept.clear()
        for layer in self._copies.values():
            layer.to_empty(device="meta")

    def decode(self, steps: Sequence[Step], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """Pass the rank's groups through the layers, each layer once; [B, T, H] a micro-batch.

        `hidden` is what the shard before returned; None on the first shard.
        """
        calls, states = self._enter(self._own(steps), hidden)
        layers = self._model.span.layers
        for index in layers:
            masks = self._masks[index] if self._masks else None
            then = index + 1 if index + 1 in layers else None
            with self._residency.borrow(index, then) as layer, masked_by(layer, masks):
                self._model.advance(index, layer, calls, states)
        return states

    def next_tokens(self, steps: Sequence[Step], hidden: Sequence[Tensor] | None) -> dict[int, list[int]]:
        """On the last shard: group -> the likeliest next token of each of its rows."""
        states = iter(self.decode(steps, hidden))
        return {
            step.group: [token for _ in step.parts() for token in self._likeliest(next(states))]
            for step in self._own(steps)
        }

    def _own(self, steps: Sequence[Step]) -> list[Step]:
        """A group stays with the rank that has its keys and values, whichever groups are left."""
        return [step for step in steps if step.group % self._ranks.size == self._ranks.rank]

    def _enter(
        self, steps: Sequence[Step], hidden: Sequence[Tensor] | None
    ) -> tuple[list[Mapping[int, Call]], list[Tensor]]:
        """For each micro-batch what the layers are given beside hidden states, and the states that enter."""
        calls: list[Mapping[int, Call]] = []
        states: list[Tensor] = []
        for step in steps:
            assert not self._model.positions or step.room <= self._model.positions, "the model has fewer positions"
            kept = self._kept.setdefault(step.group, KeyValues(len(step.pads), step.room))
            mask_BS = step.attention_mask
            for rows in step.parts():
                recorded = self._model.record(step.input_ids[rows], mask_BS[rows], Past(kept, rows, step.seen))
                given = recorded.embedded_BTH if hidden is None else hidden[len(states)].to(self._model.device)
                calls.append(recorded.calls)
                states.append(given)
        return calls, states

    def _likeliest(self, state_BTH: Tensor) -> list[int]:
        tokens: list[int] = self._model.logits(state_BTH[:, -1:])[:, 0].argmax(-1).tolist()
        return tokens


def _masked_copy(residency: Resident, index: int, masks: LayerMasks) -> nn.Module:
    with residency.borrow(index) as layer, masked_by(layer, masks):
        return copy.deepcopy(layer)
