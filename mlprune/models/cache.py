"""Keys and values of the tokens that rows have behind them, kept where the layers are that made them.

Hugging Face's layers read and write a cache that their model hands them, and the model makes masks and positions
by the length of that cache. Its own caches know their length from the tensors of layer 0, which another shard may
hold; here the length is told. Every layer keeps all positions: a sliding window is left to the mask, which changes
no number.

B: rows. N: heads of keys and values. T: new tokens. S: positions, pads included. D: a head's width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class KeyValues:
    """Room for `rows` rows of `room` positions, taken for each layer when it first runs."""

    def __init__(self, rows: int, room: int) -> None:
        self._rows, self._room = rows, room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, index: int, keys_BNTD: Tensor, values_BNTD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, [rows, N, room, D] each; made in the form of the new ones."""
        if index not in self._layers:
            self._layers[index] = self._like(keys_BNTD), self._like(values_BNTD)
        return self._layers[index]

    def _like(self, new_BNTD: Tensor) -> Tensor:
        _, heads, _, width = new_BNTD.shape
        return new_BNTD.new_empty(self._rows, heads, self._room, width)


class Past(Cache):  # type: ignore[misc]
    """What Hugging Face's code sees of `kept` in one pass: some of its rows, `seen` positions long."""

    def __init__(self, kept: KeyValues, rows: slice, seen: int) -> None:
        super().__init__(layers=[])
        self._kept, self._rows, self._seen = kept, rows, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys a layer will be given, and the position of the first."""
        return self._seen + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what is new, [B, N, T, D]; all that there is then, [B, N, S, D]."""
        end = self._seen + key_states.shape[2]
        keys, values = (whole[self._rows] for whole in self._kept.of_layer(layer_idx, key_states, value_states))
        keys[:, :, self._seen : end] = key_states
        values[:, :, self._seen : end] = value_states
        return keys[:, :, :end], values[:, :, :end]
