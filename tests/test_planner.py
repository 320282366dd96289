"""Layers to shards, what a model weighs, and what is refused before a weight is loaded."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import FAMILIES, Span, check_family
from mlprune.models.replay import ReplayModel
from mlprune.shards.planner import (
    ModelShape,
    auto_shards,
    check_memory,
    check_pattern,
    cut,
    model_shape,
    shard_memory,
)
from mlprune.variants import Pattern
from tests.tiny_models import config, source

SMALL = st.integers(0, 6)  # where a limit that is wrong by one shows
SIZES = st.lists(st.integers(1, 6) | st.integers(1, 60), min_size=1, max_size=8)


def shape(layers: Sequence[int], ends: tuple[int, int] = (0, 0)) -> ModelShape:
    """A model of nothing but sizes."""
    return ModelShape(
        layers=tuple(layers),
        ends=ends,
        tied=False,
        pruned=sum(layers),
        largest_layer=max(layers),
        total=sum(layers) + sum(ends),
        widths={f"{n}.q": 8 for n in range(len(layers))},
        hidden=8,
        intermediate=8,
        vocabulary=32,
        positions=None,
        has_experts=False,
        dtype=torch.float32,
    )


def partitions(count: int, parts: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut `count` layers into `parts` neighbouring runs of at least one."""
    for inner in itertools.combinations(range(1, count), parts - 1):
        edges = [0, *inner, count]
        yield list(itertools.pairwise(edges))


def heaviest(sizes: Sequence[int], cuts: Sequence[tuple[int, int]]) -> int:
    return max(sum(sizes[first:end]) for first, end in cuts)


# cutting


@settings(max_examples=500, deadline=None)
@given(SIZES, SMALL | st.integers(0, 200), SMALL | st.integers(0, 200), st.data())
def test_the_heaviest_shard_is_as_light_as_can_be(
    first: list[int], head: int, tail: int, data: st.DataObject
) -> None:
    model = shape(first, (head, tail))
    shards = data.draw(st.integers(1, len(first)))
    sizes = list(first)
    sizes[0] += head
    sizes[-1] += tail
    spans = cut(model, shards)
    assert len(spans) == shards
    assert [index for span in spans for index in span.layers] == list(range(len(first)))
    assert all(len(span.layers) >= 1 and span.count == len(first) for span in spans)
    best = min(heaviest(sizes, cuts) for cuts in partitions(len(first), shards))
    assert heaviest(sizes, [(span.first, span.end) for span in spans]) == best


@pytest.mark.parametrize("sizes", [[5] * 6, [100, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 100]])
def test_as_many_shards_as_layers_have_one_each(sizes: list[int]) -> None:
    assert cut(shape(sizes), 6) == tuple(Span(n, n + 1, 6) for n in range(6))


@pytest.mark.parametrize("shards", [0, -1, 5])
def test_shards_that_cannot_be_are_answered(shards: int) -> None:
    with pytest.raises(SpecError) as caught:
        cut(shape([1] * 4), shards)
    assert str(caught.value) == f"pipeline.shards: {shards}: the model has 4 layers; write 1 to 4"


def test_auto_is_a_shard_a_gpu_and_no_more_than_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, 1), (1, 1), (4, 4), (8, 6)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert auto_shards(6) == expected


# measuring

TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
MODELS = [
    ("llama", UNTIED),
    ("llama", TIED),
    ("gemma2", TIED),
    ("gpt2", TIED),
    ("bloom", TIED),
    ("opt", TIED),
    ("mixtral", UNTIED),
    ("qwen3_moe", TIED),
    ("xglm", TIED),
]


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_the_shape_is_that_of_the_real_model(family: str, changes: dict[str, bool], dtype: torch.dtype) -> None:
    made = config(family, **changes)
    found = model_shape(made, dtype, family)
    model = AutoModelForCausalLM.from_config(made).to(dtype)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    assert found.layers == tuple(bytes_of(layer) for layer in layers)
    assert found.total == bytes_of(model)
    assert found.ends == (bytes_of(model.get_input_embeddings()), bytes_of(model.get_output_embeddings()))
    assert (found.hidden, found.vocabulary, found.dtype) == (32, 384, dtype)
    assert found.has_experts is (family in ("mixtral", "qwen3_moe"))
    assert found.intermediate == max(found.widths.values())


def test_what_is_pruned_is_counted_by_hand() -> None:
    found = model_shape(config("llama"), torch.float32, "llama")
    attention, mlp = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48
    assert found.pruned == 4 * (attention + mlp)
    assert found.largest_layer == attention + mlp
    assert found.intermediate == found.widths["3.mlp.down_proj"] == 48
    assert len(found.widths) == 4 * 7
    mixture = model_shape(config("mixtral"), torch.float32, "mixtral")
    assert mixture.pruned == 4 * (attention + 4 * mlp)  # four experts; the router is not pruned
    assert mixture.widths["0.mlp.experts.down_proj.3"] == 48


def beside(family: str, changes: dict[str, bool]) -> int:
    """Bytes of norms and positions: in no layer, and neither embedding nor head. Every shard holds them."""
    model = AutoModelForCausalLM.from_config(config(family, **changes))
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = {id(parameter) for module in (layers, *ends) for parameter in module.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in apart)


def planned(family: str, changes: dict[str, bool], shards: int) -> list[int]:
    found = model_shape(config(family, **changes), torch.float32, family)
    return [shard_memory(found, span, 0, 0, 0).weights for span in cut(found, shards)]


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_the_shards_weigh_what_the_model_weighs(family: str, changes: dict[str, bool], shards: int) -> None:
    """But for what every shard holds; several shards of a tied model have its embedding twice."""
    if changes == TIED and shards == 1:
        return  # see below
    whole = AutoModelForCausalLM.from_config(config(family, **changes))
    again = bytes_of(whole.get_input_embeddings()) if changes == TIED else 0
    assert sum(planned(family, changes, shards)) == bytes_of(whole) + again - beside(family, changes)


def test_one_shard_of_a_tied_model_has_one_embedding() -> None:
    whole = AutoModelForCausalLM.from_config(config("bloom", **TIED))
    assert planned("bloom", TIED, 1) == [bytes_of(whole) - beside("bloom", TIED)]


@pytest.mark.parametrize(("family", "changes"), [("llama", UNTIED), ("bloom", TIED), ("gpt2", TIED)])
def test_a_loaded_shard_weighs_what_was_planned(family: str, changes: dict[str, bool]) -> None:
    found = model_shape(config(family), torch.float32, family)
    for span, weight in zip(cut(found, 3), planned(family, changes, 3), strict=True):
        model = ReplayModel(source(family), span, torch.float32, torch.device("cpu"))
        held = sum(bytes_of(layer) for layer in model.layers.values())
        held += sum(other.numel() * 4 for other in model.other_weights().values())
        assert weight <= held <= weight + beside(family, changes)


def test_memory_by_hand() -> None:
    model = replace(shape([10, 20, 30, 40], (7, 9)), dtype=torch.bfloat16, pruned=800)
    first, last = (shard_memory(model, span, 100, 3, 2) for span in (Span(0, 1, 4), Span(1, 4, 4)))
    assert (first.weights, last.weights) == (10 + 7, 20 + 30 + 40 + 9)
    assert (first.moments, last.moments) == (3 * 8 * 8, 3 * 3 * 8 * 8)  # float64 of every input of its layers
    assert (first.masks, last.masks) == (2 * 200 // 8, 2 * 600 // 8)  # one bit a weight
    assert first.hidden == 2 * 100 * 8 * 2
    assert first.masked_layer == 40 * (2 + 4 + 1)
    assert (first.logits, last.logits > 0) == (0, True)
    parts = ("weights", "masked_layer", "hidden", "activations", "moments", "masks", "logits")
    assert last.total == sum(getattr(last, part) for part in parts)


# refusing


def test_a_width_that_the_group_does_not_divide_is_named() -> None:
    model = model_shape(config("llama", intermediate_size=50), torch.float32, "llama")
    with pytest.raises(SpecError) as caught:
        check_pattern(model, Pattern.parse("2:4"), "search.pattern")
    remedy = "the 50 inputs of layer 0.mlp.down_proj are not divisible by 4; use unstructured"
    assert str(caught.value) == f"search.pattern: '2:4': {remedy}"
    check_pattern(model, Pattern.parse("1:2"), "search.pattern")
    check_pattern(model, Pattern.parse("unstructured"), "search.pattern")
    check_pattern(model_shape(config("gpt2"), torch.float32, "gpt2"), Pattern.parse("2:4"), "search.pattern")


def test_a_conv1ds_inputs_are_those_that_the_group_must_divide() -> None:
    model = model_shape(config("gpt2", n_inner=50), torch.float32, "gpt2")
    with pytest.raises(SpecError, match=r"the 50 inputs of layer 0\.mlp\.c_proj are not divisible by 4"):
        check_pattern(model, Pattern.parse("2:4"), "search.pattern")


@pytest.mark.parametrize("family", ["t5", "bert", "mamba"])
def test_a_family_that_is_not_known_is_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_shape(AutoConfig.for_model(family), torch.float32, "some/model")
    line = str(caught.value)
    assert line.startswith(f"model.path: 'some/model' ({family}): unsupported family; supported: ")
    assert line.endswith(", ".join(FAMILIES))


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_layers_that_share_state_are_refused_by_name(key: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_shape(config("llama", **{key: 2}), torch.float32, "some/model")
    remedy = f"its layers share state ({key}), so it cannot be cut into shards"
    assert str(caught.value) == f"model.path: 'some/model' (llama): {remedy}"
    check_family(config("llama", **{key: 0}), "some/model")


def on_cpu(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shape([2**30] * 4)
    needs = [shard_memory(model, span, 0, 0, 0) for span in cut(model, 2)]
    need = sum(part.total for part in needs)
    on_cpu(monkeypatch, need)
    check_memory(needs, "big")
    on_cpu(monkeypatch, need - 1)
    with pytest.raises(
        ModelError, match=r"^model\.path: 'big': needs .* GiB of .* GiB, this machine's free memory;"
    ):
        check_memory(needs, "big")


def test_each_shard_has_a_gpu_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shape([2**30] * 4)
    needs = [shard_memory(model, span, 0, 0, 0) for span in cut(model, 2)]
    most = max(part.total for part in needs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (most, most))
    check_memory(needs, "big")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (most - 1, most - 1))
    with pytest.raises(ModelError, match="GiB, a GPU; take more shards or bfloat16"):
        check_memory(needs, "big")
