"""Which weights of a decoder layer are pruned, and how the moments of their inputs are gathered.

Pruned: every nn.Linear and Conv1D inside a decoder layer, and every expert of a mixture, each as a matrix of its
own. Not pruned: embedding, head, norms, biases, and modules that route tokens (a router is not a Linear; a gate is
a Linear of one row). An expert's moments are those of the tokens routed to it.

O: output channels. I: input channels. T: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from mlprune.errors import ModelError
from mlprune.pruning.moments import Moments


@dataclass(frozen=True)
class Matrix:
    """A matrix that is pruned: a parameter of the layer, or a part of one."""

    parameter: str  # the parameter's name within the layer
    expert: int | None = None
    transposed: bool = False  # Conv1D keeps [I, O]

    def view_OI(self, data: Tensor) -> Tensor:
        """Return the matrix as a view, [O, I], of `data`, the parameter's tensor."""
        if self.expert is not None:
            return data[self.expert]
        return data.T if self.transposed else data


def matrices(layer: nn.Module) -> dict[str, Matrix]:
    """Return the layer's matrices by name within the layer, e.g. `mlp.experts.gate_up_proj.3` for an expert's."""
    result = {}
    for name, module in layer.named_modules():
        if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and module.out_features > 1):
            result[name] = Matrix(f"{name}.weight", transposed=isinstance(module, Conv1D))
        elif is_experts(module):
            for part in ("gate_up_proj", "down_proj"):
                for expert in range(len(getattr(module, part))):
                    result[f"{name}.{part}.{expert}"] = Matrix(f"{name}.{part}", expert)
    return result


def is_experts(module: nn.Module) -> bool:
    """Return whether the module holds experts in 3D parameters. Raises ModelError for an unsupported form."""
    if not any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return False
    supported = (
        hasattr(module, "gate_up_proj")
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_bias", False)
    )
    if not supported:
        name = type(module).__name__
        raise ModelError("model.path", name, "experts of this form cannot be pruned; use another model")
    return True


def has_experts(layer: nn.Module) -> bool:
    """Return whether the layer is a mixture of experts."""
    return any(is_experts(module) for module in layer.modules())


class _Experts(Protocol):
    """A mixture's experts, as transformers' supported families hold them."""

    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor

    def act_fn(self, gate: Tensor) -> Tensor: ...


class Observer:
    """A context manager of hooks that gathers the moments of every matrix of a layer while the layer runs.

    `before` holds the moments gathered so far in the same pass. Micro-batches are added to it one by one, so the
    sum does not depend on how the pass is cut into chunks. `keep`, flat [B * T] bool, selects the tokens of the
    next micro-batch; None selects all. `gram`: gather Gram matrices too.
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
                module.forward = partial(run_experts, module, observe=partial(self._observe_expert, name))
        for name, matrix in matrices(self.layer).items():
            if matrix.expert is None:
                module = self.layer.get_submodule(name)
                self._handles.append(module.register_forward_pre_hook(partial(self._observe, name)))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.layer.modules():
            if is_experts(module):
                module.forward = partial(run_experts, module)
        self._last = None

    def _observe(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # q, k and v, or gate and up, get the same tensor: it is summed once
        if self._last is None or self._last[0] is not args[0] or self._last[1] is not self.keep:
            input_TI = args[0].reshape(-1, args[0].shape[-1])
            if self.keep is not None:
                input_TI = input_TI[self.keep]
            self._last = (args[0], self.keep, Moments.of(input_TI, self._gram))
        self._add(name, self._last[2])

    def _observe_expert(self, module_name: str, part: str, expert: int, input_TI: Tensor) -> None:
        assert self.keep is None, "models with experts get batches without padding: a pad would be routed"
        self._add(f"{module_name}.{part}.{expert}", Moments.of(input_TI, self._gram))

    def _add(self, name: str, moments: Moments) -> None:
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def gathered(self) -> Mapping[str, Moments]:
        """Return the moments of every matrix; they are zero for an expert that no token reached."""
        result = {}
        for name, matrix in matrices(self.layer).items():
            data = self.layer.get_parameter(matrix.parameter)
            channels = matrix.view_OI(data).shape[1]
            result[name] = self.moments.get(name) or Moments.zeros(channels, data.device, self._gram)
        return result


def run_experts(
    module: nn.Module,
    hidden_TI: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    observe: Callable[[str, int, Tensor], None] | None = None,
) -> Tensor:
    """Run the experts one after another, as transformers' eager form does, and pass each input to `observe`.

    In transformers' other forms (grouped, batched) one expert's input cannot be observed.
    """
    experts = cast(_Experts, module)
    out = torch.zeros_like(hidden_TI)
    for expert in range(experts.num_experts):
        token, choice = torch.where(top_k_index == expert)
        if not len(token):
            continue
        input_TI = hidden_TI[token]
        gate, up = nn.functional.linear(input_TI, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner_TI = experts.act_fn(gate) * up
        if observe is not None:
            observe("gate_up_proj", expert, input_TI)
            observe("down_proj", expert, inner_TI)
        result = nn.functional.linear(inner_TI, experts.down_proj[expert])
        out.index_add_(0, token, (result * top_k_weights[token, choice, None]).to(out.dtype))
    return out
