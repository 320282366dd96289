"""Runs single layers of a Hugging Face model exactly as the model's own forward would.

Every layer is replaced by a recorder. One Hugging Face forward per micro-batch, which computes only the embedding,
masks, positions and rotary tables, records the arguments of each layer. Then the real layers, which are kept
outside the model, are called with these arguments in any order.
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
    """The arguments that the model's forward passes to one layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """One micro-batch, ready for replay: the input of layer 0 (on the first shard), and each layer's call."""

    embedded_BTH: Tensor
    calls: Mapping[int, Call]


class Recorder(Placeholder):
    """Replaces a decoder layer: records its call, and passes the hidden states on."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__(layer)
        self._returns_tuple = returns_tuple
        self.hidden: Tensor | None = None
        self.call: Call | None = None
        self.output: Tensor | None = None  # returned instead of the hidden states

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, Call(args, kwargs)
        out = hidden if self.output is None else self.output
        return (out, None) if self._returns_tuple else out


def load_layer(source: ModelSource, span: Span, index: int, dtype: torch.dtype) -> nn.Module:
    """Load one decoder layer to the CPU, ready to run. Nothing else of the model is read."""
    model = load_hollow(source, LoadedPart.layer(index), dtype)
    layer: nn.Module = decoder_layers(model, span.count)[1][index]
    return _make_runnable(layer)


def _make_runnable(layer: nn.Module) -> nn.Module:
    """Let the layer's experts run one after another, in the form that can be observed."""
    for module in layer.modules():
        if is_experts(module):
            module.forward = partial(run_experts, module)
    return layer


class ReplayModel:
    """One shard's layers, and the hollow model around them, which records their calls and computes the logits.

    `shell`: load the model without the layers; they are then loaded one at a time (`load_layer`) and kept
    elsewhere.
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
        self.layers = {index: _make_runnable(slots[index]) for index in part.layers}
        self._recorders = [Recorder(layer, FAMILIES[config.model_type]) for layer in slots]
        for index, recorder in enumerate(self._recorders):
            slots[index] = recorder

    def record(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, past: Past | None = None) -> Recorded:
        """Run everything but the layers, and record the calls of this shard's layers.

        With a `past`, the mask covers its positions too, and the layers read and write it when they run. Rows are
        then padded on the left. S: positions of past and new tokens; T without a past.
        """
        inputs = self._inputs(input_ids_BT, attention_mask_BS)
        if past is not None:
            # families without position ids ignore these and derive positions from the mask
            positions_BS = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BS[:, -input_ids_BT.shape[1] :]
        self._model.base_model(**inputs, past_key_values=past, use_cache=past is not None)
        calls = {index: self._recorders[index].call for index in self.span.layers}
        embedded = self._recorders[0].hidden
        self._reset_recorders()
        assert embedded is not None
        return Recorded(embedded, {index: call for index, call in calls.items() if call is not None})

    def run(self, layer: nn.Module, hidden_BTH: Tensor, call: Call) -> Tensor:
        """Return the layer's output hidden states, [B, T, H]."""
        out = layer(hidden_BTH, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result

    def advance(
        self, index: int, layer: nn.Module, calls: Sequence[Mapping[int, Call]], states: list[Tensor]
    ) -> None:
        """Run the layer on each of the states and replace them in the list, so that no chunk is held twice."""
        for number, batch_calls in enumerate(calls):
            states[number] = self.run(layer, states[number], batch_calls[index])

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Return the logits, [B, T, V], for the output of the last layer: norm, head, and what the family adds.

        Each token is computed alone, so the tokens may come from any rows and positions.
        """
        self._recorders[-1].output = hidden_BTH
        mask_BT = torch.ones(hidden_BTH.shape[:2], dtype=torch.long, device=self.device)
        try:
            inputs = {"inputs_embeds": torch.zeros_like(hidden_BTH), "attention_mask": mask_BT}
            logits: Tensor = self._model(**inputs, use_cache=False).logits
        finally:
            self._reset_recorders()
        return logits

    def _inputs(self, input_ids_BT: Tensor, attention_mask_BS: Tensor) -> dict[str, Tensor]:
        mask_BS = attention_mask_BS.to(self.device)
        if self.span.is_first:
            return {"input_ids": input_ids_BT.to(self.device), "attention_mask": mask_BS}
        # this shard has no embedding, and the embedded input is not used
        shape = (*input_ids_BT.shape, self._width)
        zeros_BTH = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return {"inputs_embeds": zeros_BTH, "attention_mask": mask_BS}

    def _reset_recorders(self) -> None:
        for recorder in self._recorders:
            recorder.hidden = recorder.call = recorder.output = None

    def other_weights(self) -> dict[str, Tensor]:
        """Return the weights outside the layers, by name; of tied weights, the one that is saved."""
        tied = self._model.all_tied_weights_keys
        return {name: data for name, data in self._model.state_dict().items() if name not in tied}
