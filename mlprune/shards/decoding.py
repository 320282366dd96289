"""Greedy generation, token by token, with a key-value cache in each shard: groups, waves and a rank's session.

Which worker is called is decided in `pipeline`. Prompts are divided into groups of similar lengths. The rows of a
group share a cache that is left-padded, so that their last tokens are aligned: the prompts pass in micro-batches
of few rows, and then the newest tokens of all rows in a single one, which reads a layer's weights only once.
Groups run in waves, as many at once as fit into memory. The division into groups depends on the prompts alone, not
on shards, ranks or waves.

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

# positions in a shard's key-value cache at a time, padding and future tokens included; at least one row is cached
CACHED_TOKENS = 2**14
# rows of a group, which a single rank continues: larger groups cost little more time, but each rank needs groups
GROUP_ROWS = 32
PAD = 0  # any id in the vocabulary works: no token attends to padding

Ended = Callable[[int, Sequence[int]], bool]  # (row, its new tokens) -> whether the row ends


@dataclass(frozen=True, eq=False)
class Step:
    """The next input of a group: its prompts, left-padded, or each row's newest token."""

    group: int  # number of the group
    input_ids: Tensor  # [B, T] int64
    pads: tuple[int, ...]  # before each row's first token
    seen: int  # positions before these
    capacity: int  # positions of a row at the end

    @property
    def attention_mask(self) -> Tensor:
        """[B, S] int64: 0 for padding."""
        positions_S = torch.arange(self.seen + self.input_ids.shape[1])
        return (positions_S >= torch.tensor(self.pads)[:, None]).long()

    def parts(self) -> Iterator[slice]:
        """Yield the rows of each micro-batch."""
        rows, tokens = self.input_ids.shape
        at_once = max(1, MICRO_BATCH_TOKENS // tokens)
        return (slice(start, start + at_once) for start in range(0, rows, at_once))


class Group:
    """Rows that are continued together, longest prompt first: the driver's part of a group."""

    def __init__(self, number: int, rows: Sequence[int], prompts: Sequence[Sequence[int]], max_new: int) -> None:
        self.number = number
        self.written: dict[int, list[int]] = {row: [] for row in rows}
        self._prompts = [list(prompts[row]) for row in rows]
        self._max_new = max_new
        self._open = set(rows)
        self._newest: Sequence[int] = ()  # one token of each row, ended rows included
        self._steps = 0

    @property
    def capacity(self) -> int:
        """Positions of a row at the end; the last token is generated but never an input."""
        return len(self._prompts[0]) + self._max_new - 1

    @property
    def open(self) -> int:
        """Number of rows that have not ended."""
        return len(self._open)

    def step(self) -> Step:
        longest = len(self._prompts[0])
        pads = tuple(longest - len(prompt) for prompt in self._prompts)
        if self._steps:
            ids, seen = [[token] for token in self._newest], longest + self._steps - 1
        else:
            ids, seen = [[PAD] * n + prompt for n, prompt in zip(pads, self._prompts, strict=True)], 0
        return Step(self.number, torch.tensor(ids), pads, seen, self.capacity)

    def take(self, tokens: Sequence[int], ended: Ended) -> None:
        """Record each row's next token."""
        self._newest, self._steps = tokens, self._steps + 1
        for (row, written), token in zip(self.written.items(), tokens, strict=True):
            if row in self._open:
                written.append(token)
                if ended(row, written) or len(written) == self._max_new:
                    self._open.remove(row)


def kept_at_once(rows: int, longest: int) -> int:
    """Return the most positions in the cache at a time, for `rows` rows of at most `longest` tokens."""
    return min(rows * longest, max(CACHED_TOKENS, longest))


def grouped(prompts: Sequence[Sequence[int]], max_new: int) -> list[Group]:
    """Divide all rows into groups, longest prompts first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        rows = len(groups[-1]) if groups else GROUP_ROWS
        if rows == GROUP_ROWS or (rows + 1) * (len(prompts[groups[-1][0]]) + max_new) > CACHED_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [Group(number, rows, prompts, max_new) for number, rows in enumerate(groups)]


def waves(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Yield consecutive groups whose keys and values fit into the cache at the same time."""
    wave: list[Group] = []
    for group in groups:
        if sum(len(other.written) * other.capacity for other in (*wave, group)) > CACHED_TOKENS and wave:
            yield wave
            wave = []
        wave.append(group)
    if wave:
        yield wave


class Session:
    """One rank's part of a wave: the key-value caches of its groups, until the wave ends.

    Masking a layer again for each token takes longer than the token itself. Therefore masked copies of resident
    layers are kept as well; for copies of offloaded layers there is no memory.
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
        """Release caches and copies now, because experts and the code that runs them refer to each other."""
        self._kept.clear()
        for layer in self._copies.values():
            layer.to_empty(device="meta")

    def decode(self, steps: Sequence[Step], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """Pass the rank's groups through the layers, each layer once; return [B, T, H] a micro-batch.

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
        """Return for each group the likeliest next token of each of its rows. Called on the last shard."""
        states = iter(self.decode(steps, hidden))
        return {
            step.group: [token for _ in step.parts() for token in self._likeliest(next(states))]
            for step in self._own(steps)
        }

    def _own(self, steps: Sequence[Step]) -> list[Step]:
        """Return this rank's groups: a group always stays with the rank that has its keys and values."""
        return [step for step in steps if step.group % self._ranks.size == self._ranks.rank]

    def _enter(
        self, steps: Sequence[Step], hidden: Sequence[Tensor] | None
    ) -> tuple[list[Mapping[int, Call]], list[Tensor]]:
        """Return for each micro-batch the layers' other arguments, and the hidden states that enter."""
        calls: list[Mapping[int, Call]] = []
        states: list[Tensor] = []
        for step in steps:
            assert not self._model.positions or step.capacity <= self._model.positions, (
                "the model has fewer positions"
            )
            kept = self._kept.setdefault(step.group, KeyValues(len(step.pads), step.capacity))
            mask_BS = step.attention_mask
            for rows in step.parts():
                recorded = self._model.record(step.input_ids[rows], mask_BS[rows], Past(kept, rows, step.seen))
                state = recorded.embedded_BTH if hidden is None else hidden[len(states)].to(self._model.device)
                calls.append(recorded.calls)
                states.append(state)
        return calls, states

    def _likeliest(self, state_BTH: Tensor) -> list[int]:
        tokens: list[int] = self._model.logits(state_BTH[:, -1:])[:, 0].argmax(-1).tolist()
        return tokens


def _masked_copy(residency: Resident, index: int, masks: LayerMasks) -> nn.Module:
    with residency.borrow(index) as layer, masked_by(layer, masks):
        return copy.deepcopy(layer)
