"""The key-value cache of a shard: keys and values of earlier tokens, for the layers that the shard holds.

Hugging Face's layers read and write a cache that their model passes to them, and the model derives masks and
positions from the length of that cache. Hugging Face's own caches take their length from the tensors of layer 0,
which another shard may hold; here the caller passes the length. Every layer keeps all positions: a sliding
window is applied by the mask, which gives the same numbers.

B: rows. N: heads of keys and values. T: new tokens. S: positions, padding included. D: width of a head.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


class KeyValues:
    """Keys and values of `rows` rows of at most `positions` positions, allocated when a layer first runs."""

    def __init__(self, rows: int, positions: int) -> None:
        self._rows, self._positions = rows, positions
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, index: int, keys_BNTD: Tensor, values_BNTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, [rows, N, positions, D] each, with the dtype of the new ones."""
        if index not in self._layers:
            self._layers[index] = self._like(keys_BNTD), self._like(values_BNTD)
        return self._layers[index]

    def _like(self, new_BNTD: Tensor) -> Tensor:
        _, heads, _, width = new_BNTD.shape
        return new_BNTD.new_empty(self._rows, heads, self._positions, width)


class Past(Cache):  # type: ignore[misc]
    """A view of some rows of the `cache`, with `length` positions, as the cache of one Hugging Face pass."""

    def __init__(self, cache: KeyValues, rows: slice, length: int) -> None:
        super().__init__(layers=[])
        self._cache, self._rows, self._length = cache, rows, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions before the new tokens."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys that a layer will get, and the position of the first."""
        return self._length + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, [B, N, T, D]. Return all up to and including them, [B, N, S, D]."""
        end = self._length + key_states.shape[2]
        keys, values = (whole[self._rows] for whole in self._cache.of_layer(layer_idx, key_states, value_states))
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]
