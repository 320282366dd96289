"""Which weights of a decoder layer are pruned, and the moments of what each of them sees.

Pruned: every nn.Linear and Conv1D inside a decoder layer, and every expert of a mixture, as matrices of
their own. Not pruned: embedding, head, norms, biases, and whatever decides where tokens go (a router is no
Linear; a gate is a Linear of one row). An expert's moments are those of the tokens routed to it.

O: output channels. I: input channels. T: tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from mlprune.errors import ModelError
from mlprune.pruning.moments import Moments


@dataclass(frozen=True)
class Matrix:
    """One matrix that is pruned, inside a parameter of the layer."""

    parameter: str  # the parameter's name within the layer
    expert: int | None = None
    transposed: bool = False  # Conv1D keeps [I, O]

    def view_OI(self, data: Tensor) -> Tensor:
        """The matrix within `data`, the parameter's tensor, as [O, I]; writing to it writes to `data`."""
        if self.expert is not None:
            return data[self.expert]
        return data.T if self.transposed else data


def matrices(layer: nn.Module) -> dict[str, Matrix]:
    """Name within the layer -> matrix. An expert's is `mlp.experts.gate_up_proj.3`."""
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and module.out_features > 1):
            found[name] = Matrix(f"{name}.weight", transposed=isinstance(module, Conv1D))
        elif is_experts(module):
            for part in ("gate_up_proj", "down_proj"):
                for expert in range(len(getattr(module, part))):
                    found[f"{name}.{part}.{expert}"] = Matrix(f"{name}.{part}", expert)
    return found


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a set of experts in 3D parameters. Raises ModelError for a kind not known here."""
    if not any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return False
    known = (
        hasattr(module, "gate_up_proj")
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_bias", False)
    )
    if not known:
        name = type(module).__name__
        raise ModelError("model.path", name, "experts of this form cannot be pruned; use another model")
    return True


def has_experts(layer: nn.Module) -> bool:
    return any(is_experts(module) for module in layer.modules())


class Observer:
    """Gathers the moments of every matrix of a layer while it runs: a context manager of hooks.

    `before` is what was gathered of the same pass: micro-batches are added to it one by one, so that the sum does
    not depend on where a pass was cut into chunks. `keep` says which tokens of the coming micro-batch count, flat
    [B * T] bool; None: all of them. `gram`: products of channels too.
    """

    def __init__(self, layer: nn.Module, before: Mapping[str, Moments] | None = None, gram: bool = False) -> None:
        self.layer, self._gram = layer, gram
        self.keep: Tensor | None = None
        self.moments: dict[str, Moments] = dict(before or {})
        self._handles: list[RemovableHandle] = []
        self._last: tuple[Tensor, Tensor | None, Moments] | None = None

    def __enter__(self) -> Observer:
        for name, module in self.layer.named_modules():
            if is_experts(module):
                module.forward = partial(run_experts, module, observe=partial(self._see_routed, name))
        for name, matrix in matrices(self.layer).items():
            if matrix.expert is None:
                module = self.layer.get_submodule(name)
                self._handles.append(module.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.layer.modules():
            if is_experts(module):
                module.forward = partial(run_experts, module)
        self._last = None

    def _see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # q, k and v, or gate and up, are given the same tensor: it is summed once
        if self._last is None or self._last[0] is not args[0] or self._last[1] is not self.keep:
            input_TI = args[0].reshape(-1, args[0].shape[-1])
            if self.keep is not None:
                input_TI = input_TI[self.keep]
            self._last = (args[0], self.keep, Moments.of(input_TI, self._gram))
        self._add(name, self._last[2])

    def _see_routed(self, module_name: str, part: str, expert: int, input_TI: Tensor) -> None:
        assert self.keep is None, "models with experts are given batches without pads: a pad would be routed"
        self._add(f"{module_name}.{part}.{expert}", Moments.of(input_TI, self._gram))

    def _add(self, name: str, seen: Moments) -> None:
        self.moments[name] = self.moments[name] + seen if name in self.moments else seen

    def gathered(self) -> Mapping[str, Moments]:
        """The moments of every matrix; zero for an expert that no token reached."""
        result = {}
        for name, matrix in matrices(self.layer).items():
            data = self.layer.get_parameter(matrix.parameter)
            channels = matrix.view_OI(data).shape[1]
            result[name] = self.moments.get(name) or Moments.zeros(channels, data.device, self._gram)
        return result


def run_experts(
    module: Any, hidden_TI: Tensor, top_k_index: Tensor, top_k_weights: Tensor, observe: Any = None
) -> Tensor:
    """The experts one after another, as in transformers' eager form, and what each is given shown to `observe`.

    transformers' other forms (grouped, batched) give no place to look at one expert's input.
    """
    out = torch.zeros_like(hidden_TI)
    for expert in range(module.num_experts):
        token, choice = torch.where(top_k_index == expert)
        if not len(token):
            continue
        input_TI = hidden_TI[token]
        gate, up = nn.functional.linear(input_TI, module.gate_up_proj[expert]).chunk(2, dim=-1)
        inner_TI = module.act_fn(gate) * up
        if observe is not None:
            observe("gate_up_proj", expert, input_TI)
            observe("down_proj", expert, inner_TI)
        result = nn.functional.linear(inner_TI, module.down_proj[expert])
        out.index_add_(0, token, (result * top_k_weights[token, choice, None]).to(out.dtype))
    return out
