"""Sizes that are known before weights are read: of models, shards and machines."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import FAMILIES, check_family
from mlprune.models.matrices import matrices
from mlprune.models.replay import ReplayModel
from mlprune.models.zero import Layout
from mlprune.planning import machine
from mlprune.planning.memory import Chunks, ResidencyPlan, worker_memory
from mlprune.planning.model_size import ModelSize, check_pattern, measure_model
from mlprune.planning.planner import cut
from mlprune.planning.work import Work
from mlprune.spec.variants import Pattern
from tests.tiny_models import config, source

EVERY = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("tied", [True, False])
ATTENTION, MLP = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48  # weights of a tiny llama's layer


def shape(family: str, dtype: torch.dtype = torch.float32, /, **changes: Any) -> ModelSize:
    return measure_model(config(family, **changes), dtype, "some/model")


LLAMA = shape("llama")


@functools.cache
def real(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    built: torch.nn.Module = AutoModelForCausalLM.from_config(config(family, tie_word_embeddings=tied)).to(dtype)
    return built


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# the model


@pytest.mark.parametrize(("dtype", "item"), [(torch.float32, 4), (torch.bfloat16, 2)])
@BOTH
@EVERY
def test_the_sizes_are_those_of_the_real_model(family: str, tied: bool, dtype: torch.dtype, item: int) -> None:
    measured, model = shape(family, dtype, tie_word_embeddings=tied), real(family, tied, dtype)
    assert measured.layers == tuple(bytes_of(layer) for layer in layers_of(model))
    assert measured.total == bytes_of(model)
    assert (measured.tied, measured.ends) == (tied, (item * 384 * 32, item * 384 * 32))
    assert measured.packed == max(Layout.of(layer, dtype).elements for layer in layers_of(model))
    assert (measured.dtype, measured.token_bytes) == (dtype, item * 32)
    assert (measured.hidden, measured.vocabulary, measured.heads, measured.positions) == (32, 384, 4, 512)
    assert measured.has_experts is (family in ("mixtral", "qwen3_moe"))


@EVERY
def test_the_matrices_are_those_of_the_real_model(family: str) -> None:
    measured = shape(family, torch.bfloat16)
    widths: dict[str, int] = {}
    largest = 0
    for number, layer in enumerate(layers_of(real(family))):
        views = {
            name: matrix.view_OI(layer.get_parameter(matrix.parameter)) for name, matrix in matrices(layer).items()
        }
        widths |= {f"{number}.{name}": view.shape[1] for name, view in views.items()}
        assert measured.layer_widths[number] == sum(view.shape[1] for view in views.values())
        assert measured.pruned[number] == sum(view.numel() for view in views.values())
        largest = max(largest, *(view.numel() for view in views.values()))
    assert measured.widths == widths
    assert (measured.intermediate, measured.largest_matrix) == (max(widths.values()), largest)


def test_the_largest_of_different_layers_counts() -> None:
    measured = shape("qwen3_moe", mlp_only_layers=[0], intermediate_size=640)  # the first is no mixture
    assert measured.packed * 4 >= measured.layers[0] > measured.layers[1]
    assert measured.largest_matrix == 640 * 32
    assert measured.layer_widths[:2] == (4 * 32 + 2 * 32 + 640, 4 * 32 + 4 * (32 + 24))


def test_pruned_weights_counted_by_hand() -> None:
    assert (LLAMA.pruned, LLAMA.largest_matrix) == ((ATTENTION + MLP,) * 4, 32 * 48)
    assert LLAMA.intermediate == LLAMA.widths["3.mlp.down_proj"] == 48
    assert LLAMA.layer_widths == (4 * 32 + 2 * 32 + 48,) * 4
    assert LLAMA.pruned_total == 4 * (ATTENTION + MLP)
    mixture = shape("mixtral")
    assert (mixture.pruned, mixture.largest_matrix) == ((ATTENTION + 4 * MLP,) * 4, 2 * 48 * 32)  # but no router
    assert mixture.widths["0.mlp.experts.down_proj.3"] == 48
    assert mixture.layer_widths == (4 * 32 + 4 * (32 + 48),) * 4


@pytest.mark.parametrize(("chosen", "experts"), [(1, 4), (2, 4), (3, 8)])
def test_active_weights_are_head_matrices_and_the_routed_experts(chosen: int, experts: int) -> None:
    assert LLAMA.active == 4 * (ATTENTION + MLP) + 384 * 32
    for family, key, width in (("mixtral", "num_local_experts", 48), ("qwen3_moe", "num_experts", 24)):
        measured = shape(family, num_experts_per_tok=chosen, **{key: experts})
        assert measured.active == 4 * (ATTENTION + chosen * 3 * 32 * width) + 384 * 32


# errors


def test_error_names_a_width_that_is_not_divisible_by_the_group() -> None:
    for family, odd, name in (("llama", "intermediate_size", "mlp.down_proj"), ("gpt2", "n_inner", "mlp.c_proj")):
        with pytest.raises(SpecError) as caught:
            check_pattern(shape(family, **{odd: 50}), Pattern.parse("2:4"), "search.pattern")
        remedy = f"the 50 inputs of layer 0.{name} are not divisible by 4; use unstructured"
        assert str(caught.value) == f"search.pattern: '2:4': {remedy}"


@pytest.mark.parametrize(("pattern", "width"), [("1:2", 50), ("unstructured", 50), ("2:4", 48)])
def test_a_pattern_that_divides_every_width_passes(pattern: str, width: int) -> None:
    check_pattern(shape("llama", intermediate_size=width), Pattern.parse(pattern), "search.pattern")


@pytest.mark.parametrize("family", ["t5", "bert", "mamba"])
def test_unsupported_families_are_rejected_by_name(family: str) -> None:
    with pytest.raises(ModelError) as caught:
        measure_model(AutoConfig.for_model(family), torch.float32, "some/model")
    known = f"unsupported family; supported: {', '.join(FAMILIES)}"
    assert str(caught.value) == f"model.path: 'some/model' ({family}): {known}"


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_layers_with_shared_state_are_rejected_by_name(key: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape("llama", **{key: 2})
    remedy = f"its layers share state ({key}), so it cannot be cut into shards"
    assert str(caught.value) == f"model.path: 'some/model' (llama): {remedy}"
    check_family(config("llama", **{key: 0}), "some/model")


# its shards


def heaviest(sizes: Sequence[int], edges: Sequence[int]) -> int:
    return max(sum(sizes[first:end]) for first, end in itertools.pairwise(edges))


SMALL = st.integers(0, 6)  # where a limit that is wrong by one shows
SIZES = st.lists(st.integers(1, 6) | st.integers(1, 60), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(SIZES, SMALL | st.integers(0, 200), SMALL | st.integers(0, 200), st.data())
def test_the_largest_shard_is_as_small_as_possible(
    layers: list[int], head: int, tail: int, data: st.DataObject
) -> None:
    count = len(layers)
    shards = data.draw(st.integers(1, count))
    spans = cut(replace(LLAMA, layers=tuple(layers), ends=(head, tail)), shards)
    assert [index for span in spans for index in span.layers] == list(range(count))
    assert [span.count for span in spans if span.layers] == [count] * shards
    sizes = [head + layers[0], *layers[1:]]
    sizes[-1] += tail
    best = min(
        heaviest(sizes, [0, *inner, count]) for inner in itertools.combinations(range(1, count), shards - 1)
    )
    assert heaviest(sizes, [0, *(span.end for span in spans)]) == best


@pytest.mark.parametrize("shards", [0, -1, 5])
def test_impossible_shard_counts_are_rejected(shards: int) -> None:
    with pytest.raises(SpecError) as caught:
        cut(LLAMA, shards)
    assert str(caught.value) == f"pipeline.shards: {shards}: the model has 4 layers; write 1 to 4"


def weights(measured: ModelSize, shards: int) -> list[int]:
    """Return the bytes planned for the weights of each resident shard."""
    given = (shards, Work((), 0, 0, 0), ResidencyPlan("resident"), Chunks(1, few=False), False, 1)
    return [worker_memory(measured, span, *given).weights for span in cut(measured, shards)]


def beside(model: torch.nn.Module) -> int:
    """Return the bytes of norms and positions outside layers, embedding and head. Every shard holds them."""
    parts = (
        layers_of(model),
        *(m for m in model.modules() if getattr(m, "weight", torch.ones(0)).shape == (384, 32)),
    )
    apart = {id(parameter) for part in parts for parameter in part.parameters()}
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in apart)


@BOTH
@EVERY
def test_shards_together_have_the_bytes_of_the_model(family: str, tied: bool) -> None:
    """Except for what every shard holds; several shards of a tied model have its embedding twice."""
    measured, model = shape(family, tie_word_embeddings=tied), real(family, tied)
    for shards in range(1, 5):
        again = 4 * 384 * 32 if tied and shards > 1 else 0
        assert sum(weights(measured, shards)) == bytes_of(model) + again - beside(model)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_a_loaded_shard_has_the_planned_bytes(family: str) -> None:
    measured = shape(family)
    for span, planned in zip(cut(measured, 3), weights(measured, 3), strict=True):
        model = ReplayModel(source(family), span, torch.float32, torch.device("cpu"))
        held = sum(bytes_of(layer) for layer in model.layers.values())
        held += sum(other.nbytes for other in model.other_weights().values())
        assert planned <= held <= planned + beside(real(family))


# the machine

H100, A10G = ("NVIDIA H100 80GB HBM3", 81000 * 2**20), ("NVIDIA A10G", 22000 * 2**20)
PRINTED = f"{H100[0]}, 81000\\n{A10G[0]}, 22000\\n"


def driver(monkeypatch: pytest.MonkeyPatch, folder: Path, printed: str, code: int = 0) -> None:
    """Install a fake nvidia-smi that prints only for the right arguments; torch sees one GPU."""
    right = '*"--query-gpu=name,memory.free"*"--format=csv,noheader,nounits"*'
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncase \"$*\" in {right}) printf '{printed}' ;; esac\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, PRINTED)
    assert machine.visible_gpus() == [H100, A10G]
    driver(monkeypatch, tmp_path, "No devices were found\\n", code=6)
    assert machine.visible_gpus() == []
    (tmp_path / "nvidia-smi").unlink()
    assert machine.visible_gpus() == []


def test_this_machine_has_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, tmp_path, PRINTED)
    here = machine.this_machine()
    assert (here.nodes, here.gpus, here.gpu_memory) == (1, 1, H100[1])
    assert (here.flops, here.disk) == (machine.GPU_FLOPS["H100"], None)
    assert 0 < here.host_memory <= psutil.virtual_memory().total
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    none = machine.this_machine()
    assert (none.gpus, none.gpu_memory, none.flops) == (0, 0, 0.0)
    both = machine.local_machine([H100, A10G])
    assert (both.gpus, both.all_gpus, both.gpu_memory) == (2, 2, A10G[1])  # the smaller free memory counts


def test_free_disk_of_a_folder_that_does_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda place: SimpleNamespace(free=len(place)))
    here = machine.local_machine([])
    assert machine.with_disk(here, tmp_path / "a" / "b") == replace(here, disk=len(str(tmp_path)))
    assert machine.with_disk(here, tmp_path).disk == len(str(tmp_path))
    assert not (tmp_path / "a").exists()


GROUPS = {  # memory.max, memory.current, memory.stat -> free of 1000
    "the group's limit minus its usage": ("900", "500", "anon 7\n", 400),
    "the file cache is reclaimed": ("900", "500", "anon 7\ninactive_file 100\nactive_file 50\n", 500),
    "never more than the machine has": ("9000", "500", "inactive_file 0\n", 1000),
    "no limit": ("max\n", "500", "inactive_file 100\n", 1000),
    "no group": (None, "500", "inactive_file 100\n", 1000),
}


@pytest.mark.parametrize(("limit", "used", "stat", "free"), GROUPS.values(), ids=GROUPS)
def test_host_memory_respects_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, used: str, stat: str, free: int
) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    for name, text in (("max", limit), ("current", used), ("stat", stat)):
        if text is not None:
            group.mkdir(parents=True, exist_ok=True)
            (group / f"memory.{name}").write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/elsewhere\n0::/a/b\n")
    monkeypatch.setattr(machine, "Path", lambda place: tmp_path / place.lstrip("/"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert machine.free_host_memory() == free


KNOWN = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A10G": "A10G"}
KNOWN |= {"NVIDIA L4": "L4", "NVIDIA L40S": "L40S", "NVIDIA L40": "L40", "NVIDIA H200": "H200"}
KNOWN |= {"Tesla V100-SXM2-16GB": "V100"}


@pytest.mark.parametrize("gpu", [*KNOWN, "NVIDIA GeForce RTX 4090", "NVIDIA A10", ""])
def test_flops_of_known_and_unknown_gpus(gpu: str) -> None:
    expected = machine.GPU_FLOPS[KNOWN[gpu]] if gpu in KNOWN else machine.UNKNOWN_GPU_FLOPS
    assert machine.gpu_flops(gpu) == expected


def test_the_speed_of_the_cores_is_measured() -> None:
    assert machine.measure_flops(torch.float32) > 0
