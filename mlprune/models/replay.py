"""Running single layers of somebody else's model, exactly as its own forward would.

Every layer is replaced by a recorder. One Hugging Face forward a micro-batch, which computes nothing but the
embedding, masks, positions and rotary tables, records what each layer would be given; then the real layers,
held aside, are called with it in whatever order is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlprune.models.cache import Past
from mlprune.models.hollow import FAMILIES, LoadedPart, Placeholder, Span, decoder_layers, load_hollow
from mlprune.models.matrices import is_experts, run_experts
from mlprune.models.source import ModelSource


@dataclass(frozen=True)
class Call:
    """What the model's forward gives one layer, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """One micro-batch, ready for replay: what enters layer 0 (on the first shard), and each layer's call."""

    embedded_BTH: Tensor
    calls: Mapping[int, Call]


class Recorder(Placeholder):
    """Stands where a decoder layer was: notes its call, and hands the hidden states on."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__(layer)
        self._returns_tuple = returns_tuple
        self.hidden: Tensor | None = None
        self.call: Call | None = None
        self.instead: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, Call(args, kwargs)
        out = hidden if self.instead is None else self.instead
        return (out, None) if self._returns_tuple else out


def load_layer(source: ModelSource, span: Span, index: int, dtype: torch.dtype) -> nn.Module:
    """One decoder layer on the CPU, ready to be run; nothing else of the model is read."""
    model = load_hollow(source, LoadedPart.layer(index), dtype)
    layer: nn.Module = decoder_layers(model, span.count)[1][index]
    return _ready(layer)


def _ready(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if is_experts(module):
            module.forward = partial(run_experts, module)
    return layer


class ReplayModel:
    """One shard's layers, held aside, and the hollow model around them that records and finishes.

    `shell`: without the layers, which are then loaded one at a time (`load_layer`) and held elsewhere.
    """

    def __init__(
        self, source: ModelSource, span: Span, dtype: torch.dtype, device: torch.device, shell: bool = False
    ) -> None:
        self.span, self.device, self.dtype = span, device, dtype
        part = LoadedPart.shell(span) if shell else LoadedPart.whole(span)
        self._model = load_hollow(source, part, dtype, device)
        config = self._model.config
        self._width = int(config.get_text_config().hidden_size)
        self.positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.prefix, slots = decoder_layers(self._model, span.count)
        self.layers = {index: _ready(slots[index]) for index in part.layers}
        self._recorders = [Recorder(layer, FAMILIES[config.model_type]) for layer in slots]
        for index, recorder in enumerate(self._recorders):
            slots[index] = recorder

    def record(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, past: Past | None = None) -> Recorded:
        """Run everything but the layers, and note what the layers of this shard would be given.

        With a `past`, the mask covers its positions too, and the layers read and write it when they run. Pads then
        stand before a row's tokens. S: positions of past and new tokens; T without a past.
        """
        inputs = self._inputs(input_ids_BT, attention_mask_BS)
        if past is not None:
            # a family without positions of this kind takes its own from the mask
            positions_BS = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BS[:, -input_ids_BT.shape[1] :]
        self._model.base_model(**inputs, past_key_values=past, use_cache=past is not None)
        calls = {index: self._recorders[index].call for index in self.span.layers}
        embedded = self._recorders[0].hidden
        self._forget()
        assert embedded is not None
        return Recorded(embedded, {index: call for index, call in calls.items() if call is not None})

    def run(self, layer: nn.Module, hidden_BTH: Tensor, call: Call) -> Tensor:
        out = layer(hidden_BTH, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result

    def advance(
        self, index: int, layer: nn.Module, calls: Sequence[Mapping[int, Call]], states: list[Tensor]
    ) -> None:
        """The states through the layer, each in place of what it was: no chunk is held twice."""
        for number, given in enumerate(calls):
            states[number] = self.run(layer, states[number], given[index])

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Norm, head and whatever the family does after it, of what left the last layer: [B, T, V].

        All of it is done token by token, so the tokens may be of any rows, at any positions.
        """
        self._recorders[-1].instead = hidden_BTH
        mask_BT = torch.ones(hidden_BTH.shape[:2], dtype=torch.long, device=self.device)
        try:
            inputs = {"inputs_embeds": torch.zeros_like(hidden_BTH), "attention_mask": mask_BT}
            logits: Tensor = self._model(**inputs, use_cache=False).logits
        finally:
            self._forget()
        return logits

    def _inputs(self, input_ids_BT: Tensor, attention_mask_BS: Tensor) -> dict[str, Tensor]:
        mask_BS = attention_mask_BS.to(self.device)
        if self.span.is_first:
            return {"input_ids": input_ids_BT.to(self.device), "attention_mask": mask_BS}
        # the embedding is not here, and what it would give is not used
        shape = (*input_ids_BT.shape, self._width)
        zeros_BTH = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return {"inputs_embeds": zeros_BTH, "attention_mask": mask_BS}

    def _forget(self) -> None:
        for recorder in self._recorders:
            recorder.hidden = recorder.call = recorder.instead = None

    def other_weights(self) -> dict[str, Tensor]:
        """What the hollow model holds beside its layers, by name; of tied weights, the one that is saved."""
        tied = self._model.all_tied_weights_keys
        return {name: data for name, data in self._model.state_dict().items() if name not in tied}
