"""The matrices of a layer, the moments of their inputs, and masks that are applied during a borrow."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlprune.errors import ModelError
from mlprune.models.hollow import decoder_layers, meta_model
from mlprune.models.matrices import Matrix, Observer, has_experts, is_experts, matrices, run_experts
from mlprune.models.residency import Resident, masked, masked_by, pruned_parameters
from mlprune.pruning.masks import PackedMask
from mlprune.pruning.moments import Moments
from tests.tiny_models import config

EXPERTS, WIDTH, INNER = 3, 6, 5


class Attention(nn.Module):
    """Three matrices with one input, a fourth with another, a norm, and a gate of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in (6, 2, 2))
        self.gate = nn.Linear(WIDTH, 1)
        self.out = nn.Linear(2, WIDTH)

    def forward(self, hidden_BTH: Tensor, fail: bool = False) -> Tensor:
        inner = self.norm(hidden_BTH)
        mixed: Tensor = self.q(inner)[..., :2] + self.k(inner) * self.v(inner) * self.gate(inner)
        if fail:
            raise RuntimeError("in the middle of a layer")
        out: Tensor = self.out(mixed)
        return out


class Experts(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.functional.silu
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        vars(self).update(attributes)

    def forward(self, hidden_TI: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return run_experts(self, hidden_TI, index, weights)


class Sparse(nn.Module):
    """A mixture: experts and a router that is not a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH)), Experts()

    def forward(self, hidden_TI: Tensor, index: Tensor) -> None:
        self.experts(hidden_TI, index, torch.full(index.shape, 0.5))


def gpt2_mlp() -> nn.Module:
    return nn.Sequential(Conv1D(5, WIDTH), nn.GELU(), Conv1D(WIDTH, 5))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def by_hand(layer: nn.Module, run: Any) -> dict[str, list[Tensor]]:
    """Return the inputs of each module, recorded with separate hooks."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in layer.named_modules():
        note = partial(lambda name, _, args: seen.setdefault(name, []).append(args[0]), name)
        handles.append(module.register_forward_pre_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return seen


def same(actual: Moments, expected: Moments) -> bool:
    return actual.tokens == expected.tokens and torch.equal(actual.sumsq_I, expected.sumsq_I)


def test_linears_are_listed_and_gates_norms_and_biases_are_not() -> None:
    assert matrices(Attention()) == {name: Matrix(f"{name}.weight") for name in ("q", "k", "v", "out")}
    assert pruned_parameters(Attention()) == ("q.weight", "k.weight", "v.weight", "out.weight")


def test_conv1d_is_viewed_as_rows_of_outputs() -> None:
    layer = gpt2_mlp()
    assert matrices(layer) == {name: Matrix(f"{name}.weight", transposed=True) for name in ("0", "2")}
    weight_IO = layer.get_parameter("0.weight").data
    view_OI = matrices(layer)["0"].view_OI(weight_IO)
    assert view_OI.shape == (5, WIDTH)
    view_OI[4, 1] = 77
    assert weight_IO[1, 4] == 77


def test_every_expert_is_a_matrix_and_the_router_is_not() -> None:
    layer = Sparse()
    experts = matrices(layer)
    parts = ("gate_up_proj", "down_proj")
    assert list(experts) == [f"experts.{part}.{n}" for part in parts for n in range(EXPERTS)]
    assert experts["experts.down_proj.2"] == Matrix("experts.down_proj", 2)
    assert pruned_parameters(layer) == ("experts.gate_up_proj", "experts.down_proj")
    experts["experts.down_proj.2"].view_OI(layer.experts.down_proj.data)[0, 0] = 77
    assert layer.experts.down_proj[2, 0, 0] == 77
    assert has_experts(layer)
    assert not has_experts(Attention())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "llama"])
def test_real_layers(family: str) -> None:
    _, layers = decoder_layers(meta_model(config(family)), 4)
    attention = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    attention = {"attn.c_attn", "attn.c_proj"} if family == "gpt2" else attention
    dense = {"gpt2": {"mlp.c_fc", "mlp.c_proj"}, "llama": {f"mlp.{p}_proj" for p in ("gate", "up", "down")}}
    experts = {f"mlp.experts.{part}.{n}" for part in ("gate_up_proj", "down_proj") for n in range(4)}
    assert set(matrices(layers[2])) == attention | dense.get(family, experts)


UNSUPPORTED = [Experts(is_transposed=True), Experts(has_bias=True), nn.Conv1d(2, 2, 3)]


@pytest.mark.parametrize("module", UNSUPPORTED)
def test_unsupported_experts_are_refused(module: nn.Module) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.path: {type(module).__name__}: experts of this form cannot be"
    ):
        matrices(nn.Sequential(module))
    assert is_experts(Experts(is_transposed=False, has_bias=False))


# moments


def test_each_matrix_has_the_moments_of_its_own_input() -> None:
    layer, inputs = Attention(), [torch.randn(2, 4, WIDTH), torch.randn(1, 3, WIDTH)]
    with torch.no_grad():
        seen = by_hand(layer, lambda: [layer(batch) for batch in inputs])
        with Observer(layer) as observer:
            for batch in inputs:
                layer(batch)
    gathered = observer.gathered()
    assert list(gathered) == ["q", "k", "v", "out"]
    for name, moments in gathered.items():
        first, second = (batch.reshape(-1, batch.shape[-1]) for batch in seen[name])
        assert same(moments, Moments.of(first) + Moments.of(second)), name
        assert moments.tokens == 11
    assert not torch.equal(gathered["q"].sumsq_I[:2], gathered["out"].sumsq_I)


def test_a_shared_input_is_summed_once_and_counted_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen, real = Attention(), list[Tensor](), Moments.of
    monkeypatch.setattr(Moments, "of", lambda input_TI, gram: real(seen.append(input_TI) or input_TI, gram))  # type: ignore[func-returns-value]
    with torch.no_grad(), Observer(layer) as observer:
        layer(torch.randn(2, 4, WIDTH))
    assert len(seen) == 2  # q, k and v together; out
    assert same(observer.gathered()["q"], observer.gathered()["v"])


def test_padding_is_ignored() -> None:
    layer, hidden_BTH = Attention(), torch.randn(2, 4, WIDTH)
    keep_BT = torch.tensor([[True, True, True, False], [True, False, False, False]])
    with torch.no_grad():
        seen = by_hand(layer, lambda: layer(hidden_BTH))
        with Observer(layer) as observer:
            observer.keep = keep_BT.reshape(-1)
            layer(hidden_BTH)
    for name, moments in observer.gathered().items():
        assert same(moments, Moments.of(seen[name][0][keep_BT])), name
        assert moments.tokens == 4


def test_same_tensor_with_other_padding_is_summed_again() -> None:
    layer, hidden_TI = nn.Sequential(nn.Linear(WIDTH, 2)), torch.randn(4, WIDTH)
    with torch.no_grad(), Observer(layer) as observer:
        for count in (1, 4):
            observer.keep = torch.arange(4) < count
            layer(hidden_TI)
    assert observer.gathered()["0"].tokens == 5


def test_conv1d_has_the_moments_of_its_inputs() -> None:
    layer, input_TI = gpt2_mlp(), torch.randn(7, WIDTH)
    with torch.no_grad(), Observer(layer) as observer:
        layer(input_TI)
    assert same(observer.gathered()["0"], Moments.of(input_TI))
    assert observer.gathered()["2"].sumsq_I.shape == (5,)


def test_expert_has_the_moments_of_the_tokens_routed_to_it() -> None:
    layer, hidden_TI = Sparse(), torch.randn(4, WIDTH)
    index = torch.tensor([[0], [2], [2], [2]])  # no token is routed to expert 1
    with torch.no_grad(), Observer(layer) as observer:
        layer(hidden_TI, index)
    gathered = observer.gathered()
    assert same(gathered["experts.gate_up_proj.0"], Moments.of(hidden_TI[:1]))
    assert same(gathered["experts.gate_up_proj.2"], Moments.of(hidden_TI[1:]))
    gate, up = (hidden_TI[1:] @ layer.experts.gate_up_proj.data[2].T).chunk(2, dim=-1)
    inner = Moments.of(torch.nn.functional.silu(gate) * up)
    assert gathered["experts.down_proj.2"].tokens == 3
    torch.testing.assert_close(gathered["experts.down_proj.2"].sumsq_I, inner.sumsq_I, rtol=1e-5, atol=0)
    assert same(gathered["experts.gate_up_proj.1"], Moments.zeros(WIDTH))
    assert same(gathered["experts.down_proj.1"], Moments.zeros(INNER))


def test_experts_never_get_padding() -> None:
    layer = Sparse()
    with Observer(layer) as observer:
        observer.keep = torch.ones(4, dtype=torch.bool)
        with pytest.raises(AssertionError, match="without padding"):
            layer(torch.randn(4, WIDTH), torch.zeros(4, 1, dtype=torch.int64))


def test_hooks_are_removed_even_after_a_failure() -> None:
    layer = Attention()
    with pytest.raises(RuntimeError, match="in the middle"), Observer(layer) as observer:
        layer(torch.randn(1, 2, WIDTH), fail=True)
    assert not any(module._forward_pre_hooks for module in layer.modules())
    before = dict(observer.moments)
    layer(torch.randn(1, 2, WIDTH))
    assert observer.moments == before


def test_experts_are_not_observed_after_the_block() -> None:
    layer, index = Sparse(), torch.zeros(4, 1, dtype=torch.int64)
    with Observer(layer) as observer:
        layer(torch.randn(4, WIDTH), index)
    layer(torch.randn(4, WIDTH), index)
    assert observer.gathered()["experts.gate_up_proj.0"].tokens == 4


# masks


def random_masks(layer: nn.Module) -> dict[str, PackedMask]:
    masks = {}
    for name, matrix in matrices(layer).items():
        weight_OI = matrix.view_OI(layer.get_parameter(matrix.parameter).data)
        masks[name] = PackedMask.pack(torch.rand(weight_OI.shape) < 0.5)
    return masks


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: data.clone() for name, data in layer.state_dict().items()}


def check_masked(layer: nn.Module, dense: Mapping[str, Tensor], masks: Mapping[str, PackedMask]) -> None:
    for name, matrix in matrices(layer).items():
        masked_OI = matrix.view_OI(layer.get_parameter(matrix.parameter).data)
        dense_OI, keep_OI = matrix.view_OI(dense[matrix.parameter]), masks[name].unpack()
        assert torch.equal(masked_OI[keep_OI], dense_OI[keep_OI]), name
        dropped = masked_OI[~keep_OI]
        assert (dropped == 0).all()
        assert not dropped.signbit().any(), "+0.0: a checkpoint's bytes and a sum's sign depend on it"


@pytest.mark.parametrize("make", [Attention, gpt2_mlp, Sparse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borrowed_layer_is_masked_and_then_dense_again(make: Any, dtype: torch.dtype) -> None:
    layer = make().to(dtype).requires_grad_(False)
    dense, masks = snapshot(layer), random_masks(layer)
    others = set(dense) - set(pruned_parameters(layer))
    with Resident({7: layer}).borrow(7) as borrowed, masked_by(layer, None):
        assert all(torch.equal(data, dense[name]) for name, data in borrowed.state_dict().items())
    with Resident({7: layer}).borrow(7) as borrowed, masked_by(borrowed, masks):
        assert borrowed is layer
        check_masked(layer, dense, masks)
        assert all(torch.equal(layer.state_dict()[name], dense[name]) for name in others)
    assert all(torch.equal(data, dense[name]) for name, data in layer.state_dict().items())


def test_layer_is_dense_again_after_a_failure() -> None:
    layer = gpt2_mlp()
    dense, masks = snapshot(layer), random_masks(layer)
    with pytest.raises(KeyboardInterrupt), masked_by(layer, masks):
        raise KeyboardInterrupt
    assert all(torch.equal(data, dense[name]) for name, data in layer.state_dict().items())


@pytest.mark.parametrize("make", [Attention, gpt2_mlp, Sparse])
def test_masked_copies_are_copies(make: Any) -> None:
    layer = make()
    dense, masks = snapshot(layer), random_masks(layer)
    copies = masked(layer, masks)
    assert tuple(copies) == pruned_parameters(layer)
    for name, copy in copies.items():
        assert copy.stride() == layer.get_parameter(name).stride()
        copy.fill_(9)
    assert all(torch.equal(data, dense[name]) for name, data in layer.state_dict().items())
