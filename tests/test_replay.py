"""Every supported family, run in pieces, is bit-identical to Hugging Face's forward of the whole model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlprune.models.hollow import FAMILIES, Span
from mlprune.models.matrices import is_experts, run_experts
from mlprune.models.quiet import quiet_transformers
from mlprune.models.replay import ReplayModel
from tests.tiny_models import source

LENGTHS = (23, 17, 9)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 384, (len(LENGTHS), LENGTHS[0]), generator=generator)
    mask_BT = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
    return ids_BT, mask_BT


def whole_model(family: str) -> torch.nn.Module:
    with quiet_transformers():
        load: Any = AutoModelForCausalLM.from_pretrained
        model: torch.nn.Module = load(source(family).folder, experts_implementation="eager").eval()
    return model


def in_pieces(family: str, spans: list[Span], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    hidden = None
    for span in spans:
        model = ReplayModel(source(family), span, torch.float32, torch.device("cpu"))
        recorded = model.record(ids_BT, mask_BT)
        hidden = recorded.embedded_BTH if hidden is None else hidden
        for index, layer in model.layers.items():
            before = hidden.clone()
            after = model.run(layer, hidden, recorded.calls[index])
            assert torch.equal(hidden, before), "a layer must not write to its input, because it is run twice"
            hidden = after
    assert hidden is not None
    return model.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
@torch.inference_mode()
def test_pieces_equal_the_whole(family: str, padded: bool) -> None:
    ids_BT, mask_BT = batch()
    if not padded:
        mask_BT = torch.ones_like(mask_BT)
    expected = whole_model(family)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    assert expected.std() > 0.05, "equal logits for all tokens would prove nothing"
    for ends in ([4], [2, 4], [1, 2, 3, 4]):
        spans = [Span(first, end, 4) for first, end in zip([0, *ends], ends, strict=False)]
        assert torch.equal(in_pieces(family, spans, ids_BT, mask_BT), expected), ends


@torch.inference_mode()
def test_shard_holds_only_its_own_weights() -> None:
    def bytes_of(span: Span) -> int:
        model = ReplayModel(source("llama"), span, torch.float32, torch.device("cpu"))
        layers = sum(p.numel() for layer in model.layers.values() for p in layer.parameters())
        return layers + sum(weight.numel() for weight in model.other_weights().values())

    whole, first, middle, last = (bytes_of(Span(a, b, 4)) for a, b in [(0, 4), (0, 1), (1, 2), (2, 4)])
    embedding, norm = 384 * 32, 32
    layer = (whole - 2 * embedding - norm) // 4
    assert (first, middle, last) == (layer + embedding + norm, layer + norm, 2 * layer + embedding + norm)


@torch.inference_mode()
def test_experts_equal_the_eager_form() -> None:
    experts = next(m for m in whole_model("mixtral").modules() if is_experts(m))
    hidden_TI = torch.randn(50, 32)
    weight, index = torch.rand(50, 4).topk(2)
    assert torch.equal(run_experts(experts, hidden_TI, index, weight), experts(hidden_TI, index, weight))
