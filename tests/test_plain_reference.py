"""Compares mlprune's masks with those of a plain implementation from the formula: hooks, a whole model, argsort.

The reference shares only the tokens with mlprune. It runs each prompt alone and unpadded, where mlprune runs
padded micro-batches, so sums differ in their last bits. So a weight's mask may only differ if its score is
within 1e-5 of its row's threshold, and few may.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mlprune.spec.variants import Variant
from mlprune.sweep.masks import gather_moments, make_masks
from tests.tiny_models import source
from tests.work import MIXED, MIXED_SEQUENTIAL, SEQUENTIAL, SPARSE_2_4, WANDA, masks_of, opened, ready

Ids = Sequence[Tensor]
PLAIN = {"llama": "model.layers", "gpt2": "transformer.h", "bloom": "transformer.h"}


def linears(layer: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def oriented(module: Any) -> Tensor:
    weight: Tensor = module.weight.data
    return weight.T if isinstance(module, Conv1D) else weight


def sums_of_squares(model: nn.Module, layer: nn.Module, prompts: Ids) -> tuple[dict[str, Tensor], int]:
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)
            sums[name] = sums.get(name, torch.zeros(())) + squares

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears(layer).items()]
    for ids in prompts:
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sums, sum(len(ids) for ids in prompts)


def plain_scores(model: nn.Module, layer: nn.Module, parts: Sequence[tuple[Ids, float]]) -> dict[str, Tensor]:
    """|W_ij| * ||X_j||, where ||X_j||^2 is the weighted sum of the parts' mean squares."""
    norms: dict[str, Tensor] = {}
    for prompts, weight in parts:
        sums, tokens = sums_of_squares(model, layer, prompts)
        for name, squares in sums.items():
            norms[name] = norms.get(name, torch.zeros(())) + squares * weight / tokens
    return {name: oriented(m).double().abs() * norms[name].sqrt() for name, m in linears(layer).items()}


def dropped(score_OI: Tensor, variant: Variant) -> Tensor:
    groups = score_OI.reshape(-1, 4) if variant.pattern.group else score_OI
    count = 2 if variant.pattern.group else int(score_OI.shape[1] * variant.sparsity)
    order = groups.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).reshape(score_OI.shape)


def plain_prune(model: nn.Module, layers: nn.ModuleList, variant: Variant, parts: Any) -> dict[str, Any]:
    """Zero the weights of `model` in place. Return each matrix's scores, by layer and name."""
    scores: dict[str, Tensor] = {}
    if variant.propagation == "dense":
        of_layer = [plain_scores(model, layer, parts) for layer in layers]
    for index, layer in enumerate(layers):
        score = of_layer[index] if variant.propagation == "dense" else plain_scores(model, layer, parts)
        for name, module in linears(layer).items():
            oriented(module)[dropped(score[name], variant)] = 0
            scores[f"{index}.{name}"] = score[name]
    return scores


def near_threshold(score_OI: Tensor, drop_OI: Tensor) -> Tensor:
    """Select the weights whose score is within 1e-5 of the largest dropped score of their row."""
    threshold_O1 = torch.where(drop_OI, score_OI, 0).amax(1, keepdim=True)
    return (score_OI / threshold_O1 - 1).abs() < 1e-5


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("variant", [WANDA, SEQUENTIAL, SPARSE_2_4, MIXED, MIXED_SEQUENTIAL], ids=str)
@torch.no_grad()
def test_masks_equal_the_plain_ones(family: str, variant: Variant, tmp_path: Path) -> None:
    prepared = ready(tmp_path, source(family), shards=2)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        outcome = make_masks(prepared, pipeline, variant)
        weights = masks_of(prepared, pipeline, variant)
    model = AutoModelForCausalLM.from_pretrained(source(family).folder).eval()
    shares = [float(weight) for side in prepared.recipe(variant).sides for _, weight in side.sets]
    prompts = [[torch.tensor(p.ids) for p in calibration.prompts] for calibration in prepared.sets_of(variant)]
    layers = model.get_submodule(PLAIN[family])
    scores = plain_prune(model, layers, variant, list(zip(prompts, shares, strict=True)))
    total = differing = 0
    for index, layer in enumerate(layers):
        for name, module in linears(layer).items():
            ours = weights[f"{PLAIN[family]}.{index}.{name}.weight"]
            drop = (ours.T if isinstance(module, Conv1D) else ours) == 0
            score = scores[f"{index}.{name}"]
            differs = drop != dropped(score, variant)
            if not variant.pattern.group:
                assert not (differs & ~near_threshold(score, drop)).any(), f"{index}.{name}"
                assert torch.equal(drop.sum(1), dropped(score, variant).sum(1))
            else:
                assert not differs.any(), f"{index}.{name}"
            total += drop.numel()
            differing += int(differs.sum())
    assert outcome.weights == total
    assert differing <= total // 10_000
