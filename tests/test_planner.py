"""The memory of a worker, and the choice of a residency. How models are cut is in test_model_size.py."""

import bisect
import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlprune.data.batches import MICRO_BATCH_TOKENS, Batch
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span
from mlprune.planning import planner
from mlprune.planning.machine import Machine
from mlprune.planning.memory import Chunks, ResidencyPlan, WorkerMemory, worker_memory
from mlprune.planning.model_size import ModelSize, measure_model
from mlprune.planning.planner import Plan, cut
from mlprune.planning.work import Work
from mlprune.spec.loading import apply_assignments, parse_spec
from mlprune.spec.schema import PipelineSpec
from tests.tiny_models import config

GIB, BIG = 2**30, 2**50
TINY = measure_model(config("llama", tie_word_embeddings=False), torch.float32, "llama")


def model_of(layers: list[int], ends: tuple[int, int] = (0, 0)) -> ModelSize:
    """Return a float32 model with these bytes per layer; all weights are pruned; inputs are 1, 2, 3 ... wide."""
    sizes = replace(TINY, layers=tuple(layers), ends=ends, layer_widths=tuple(range(1, len(layers) + 1)))
    return replace(sizes, pruned=tuple(size // 4 for size in layers), packed=max(layers) // 4)


def test_chunks_keep_all_shards_busy_within_the_limit() -> None:
    dense, masked = (Chunks(10**9, few=False).size(2400, 3, masked) for masked in (False, True))
    assert dense <= masked <= 2400 / 3  # masks are made again for each chunk
    assert Chunks(10**9, few=False).size(2400, 6, False) == dense / 2
    for few, shards, whole in ((True, 3, False), (True, 3, True), (False, 1, True)):
        assert Chunks(2400, few).size(2400, shards, whole) == 2400
        assert Chunks(7, few).size(2400, shards, whole) == 7


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 900)), st.builds(Chunks, st.integers(1, 3000)), st.integers(1, 4), st.booleans())
def test_chunks_are_consecutive_and_full(sizes: list[int], cutter: Chunks, shards: int, masked: bool) -> None:
    batches = [Batch(torch.zeros((1, size), dtype=torch.int64), (size,), (0,)) for size in sizes]
    chunks = list(cutter.split(batches, shards, masked))
    assert [id(batch) for chunk in chunks for batch in chunk] == [id(batch) for batch in batches]
    most = cutter.size(sum(sizes), shards, masked)
    tokens = [[batch.input_ids.numel() for batch in chunk] for chunk in chunks]
    assert all(len(chunk) == 1 or 0 < sum(chunk) <= most for chunk in tokens)
    assert all(sum(chunk) + after[0] > most for chunk, after in itertools.pairwise(tokens))


WORK = Work(calibration=(4000, 6000), evaluation=5000, longest=100, variants=9)
RESIDENT, CPU, NVME = ResidencyPlan("resident"), ResidencyPlan("zero", "cpu"), ResidencyPlan("zero", "nvme")
MODEL = model_of([1000, 2000, 3000, 4000], (700, 900))
ALL, FIRST, LAST = Span(0, 4, 4), Span(0, 2, 4), Span(2, 4, 4)


def held(
    span: Span, how: ResidencyPlan = RESIDENT, gpu: bool = True, limit: int = 10**6, **work: Any
) -> WorkerMemory:
    chunks, shards = Chunks(limit, few=how != RESIDENT), 1 if span == ALL else 2
    return worker_memory(MODEL, span, shards, replace(WORK, **work), how, chunks, gpu, trials=1)


def test_resident_weights_are_the_layers_and_the_shards_ends() -> None:
    parts = [held(span) for span in (ALL, FIRST, LAST)]
    assert [part.weights for part in parts] == [10000 + 700 + 900, 3000 + 700, 7000 + 900]
    assert [part.disk for part in parts] == [0, 0, 0]
    assert parts[0].host < parts[1].host == parts[2].host  # hidden states between shards pass through host memory


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_offloaded_layers_take_host_memory_or_disk(ranks: int) -> None:
    cpu, nvme = replace(CPU, ranks=ranks), replace(NVME, ranks=ranks)
    share, first_share, buffers = 7000 // ranks, 3000 // ranks, 2 * 4000 // ranks
    assert [(held(LAST, how).weights, held(LAST, how).disk) for how in (cpu, nvme)] == [(900, 0), (900, share)]
    assert held(LAST, cpu).host - held(FIRST, cpu).host == share - first_share
    assert held(LAST, cpu).host - share == held(LAST, nvme).host - buffers >= held(LAST).host
    two_layers = [held(FIRST, how).working - held(FIRST).working for how in (cpu, nvme)]
    assert two_layers == [2 * 4000, 2 * 4000]  # of the largest of any shard
    here, disk = held(LAST, cpu, gpu=False), held(LAST, nvme, gpu=False)  # the host is the device
    assert [here.weights, here.host, here.disk] == [900 + share, 0, 0]
    assert [disk.weights, disk.host, disk.disk] == [900, 0, share]


def test_masks_take_one_bit_per_weight_and_trial() -> None:
    rest = (MODEL, LAST, 2, WORK, RESIDENT, Chunks(1, few=False), True)
    assert [worker_memory(*rest, trials).masks for trials in (1, 2, 8)] == [1750 // 8, 2 * 1750 // 8, 1750]


@pytest.mark.parametrize(("span", "widths"), [(ALL, 10), (FIRST, 3), (LAST, 7)])
def test_moments_take_eight_bytes_per_input_and_set(span: Span, widths: int) -> None:
    sets = [held(span, calibration=(100,) * count).moments for count in range(4)]
    assert [after - before for before, after in itertools.pairwise(sets)] == [widths * 8] * 3


def test_only_the_last_shard_has_logits_and_only_with_evaluation() -> None:
    assert held(ALL).logits == held(LAST).logits > 0
    assert held(FIRST).logits == held(LAST, evaluation=0).logits == 0


@pytest.mark.parametrize("gpu", [True, False])
def test_hidden_states_are_those_of_the_largest_chunk(gpu: bool) -> None:
    parts = [held(ALL, CPU, gpu, limit).hidden for limit in (2000, 3000, 4000)]
    assert parts == [parts[0], parts[0] * 3 // 2, parts[0] * 2]
    whole = held(ALL, CPU, gpu).hidden
    assert whole == held(ALL, CPU, gpu, 10**7).hidden == 5 * parts[0] >= 5 * 2000 * 32 * 4  # all sets together
    assert held(ALL, CPU, gpu, evaluation=20000).hidden == 2 * whole
    uncut = [held(ALL, CPU, gpu, 1, **{kind: 4000}).hidden for kind in ("sequential_tokens", "longest")]
    assert uncut == [parts[2], parts[2]]
    assert held(ALL, replace(CPU, ranks=2), gpu).hidden < whole


def test_a_rank_holds_a_whole_micro_batch() -> None:
    part = held(ALL, replace(CPU, ranks=4), calibration=(1024,), evaluation=0)
    assert part.hidden >= MICRO_BATCH_TOKENS * MODEL.token_bytes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 7))
def test_more_shards_and_more_ranks_never_need_more_memory(layers: list[int], end: int, ranks: int) -> None:
    model, few = model_of(layers, (end, end)), Chunks(1, few=True)

    def largest(shards: int, how: ResidencyPlan, kind: str) -> int:
        parts = [worker_memory(model, span, shards, WORK, how, few, True, 1) for span in cut(model, shards)]
        return max(int(getattr(part, kind)) for part in parts)

    weights = [largest(shards, RESIDENT, "weights") for shards in range(1, len(layers) + 1)]
    assert weights == sorted(weights, reverse=True)
    for how, kind in itertools.product((CPU, NVME), ("host", "disk", "hidden")):
        assert largest(1, replace(how, ranks=ranks + 1), kind) <= largest(1, replace(how, ranks=ranks), kind)


# the choice of a residency

BLOCKS, UNEVEN = model_of([GIB] * 8, (GIB, GIB)), model_of([5 * GIB, GIB])
GPUS = Machine(nodes=1, gpus=2, gpu_memory=BIG, host_memory=BIG, host_to_device=1e9, flops=1e12, disk=BIG)
CORES = replace(GPUS, gpus=0, gpu_memory=0)
BOTH = pytest.mark.parametrize("machine", [GPUS, CORES])
BRIEF = Work(calibration=(1000,), evaluation=1000, longest=10, variants=1)  # every chunk is a micro-batch
LONG = replace(BRIEF, calibration=(10**8,), evaluation=10**7)
ZERO = {"residency": "zero"}


def plan(machine: Machine, work: Work = BRIEF, model: ModelSize = BLOCKS, /, **options: Any) -> Plan:
    return planner.make_plan(model, work, machine, PipelineSpec(**options), "big")


def refused(machine: Machine, **options: Any) -> ModelError:
    with pytest.raises(ModelError, match=r"\A.*'big'.*\Z") as caught:  # one line, with the model's name
        plan(machine, **options)
    return caught.value


def device(chosen: Plan) -> int:
    return max(part.total for part in chosen.memory)


def offloaded(chosen: Plan) -> int:
    return sum(part.disk or part.host or part.total for part in chosen.memory)


def gpus(need: int, workers: int = 2) -> Machine:
    """Return two GPUs that have exactly this many usable bytes per worker."""
    memory = bisect.bisect_left(
        range(BIG), need, key=lambda n: planner.device_bytes(replace(GPUS, gpu_memory=n), workers, PipelineSpec())
    )
    return replace(GPUS, gpu_memory=memory)


ENOUGH, SHORT = gpus(device(plan(GPUS))), gpus(device(plan(GPUS)) - 1)  # by one byte
HOST, DISK, CORE = (
    offloaded(plan(GPUS, **ZERO)),
    offloaded(plan(GPUS, **ZERO, offload="nvme")),
    offloaded(plan(CORES)),
)
LACK, LACKS = r"resident needs [\d.]+ GiB of [\d.]+ GiB", "needs .* host memory"
CHOICES = [
    (ENOUGH, "resident", ""),
    (replace(SHORT, host_memory=HOST), "zero/cpu", f"{LACK} per worker, so zero/cpu"),
    (replace(SHORT, host_memory=HOST - 1), "zero/nvme", f"{LACK} per worker, zero/cpu {LACKS}, so zero/nvme"),
    (replace(CORES, host_memory=CORE), "resident", ""),
    (replace(CORES, host_memory=CORE - 1), "zero/nvme", f"{LACK} free memory, so zero/nvme"),
]
NONSENSE = ["offload=cpu", "ranks_per_shard=2", *(f"worker_memory={size}" for size in ("lots", -1, 0, "true"))]
AUTO = [(1, 1, 1, 1), (1, 4, 1, 4), (1, 4, 3, 1), (2, 3, 1, 6), (2, 3, 2, 3), (3, 4, 1, 8), (4, 0, 1, 1)]


@pytest.mark.parametrize(("machine", "residency", "reason"), CHOICES)
def test_first_residency_that_fits_is_chosen_with_reason(machine: Machine, residency: str, reason: str) -> None:
    chosen = plan(machine)
    assert str(chosen.residency) == residency
    assert re.fullmatch(reason, chosen.reason)


@pytest.mark.parametrize(("variants", "trials"), [(1, 1), (2, 2), (9, 2)])
def test_fewer_trials_are_tried_before_offloading(variants: int, trials: int) -> None:
    work = replace(BRIEF, variants=variants)
    roomy = plan(GPUS, work)
    assert (roomy.trials, plan(gpus(device(roomy)), work).trials) == (trials, trials)
    tight = plan(ENOUGH, work)  # memory for the masks of one trial
    assert (tight.residency, tight.trials, tight.reason) == (RESIDENT, 1, "")


@BOTH
def test_required_residency_is_chosen_with_its_memory(machine: Machine) -> None:
    kinds = ("process", "weights", "working", "hidden", "activations", "moments", "masks", "logits")
    for residency in (RESIDENT, CPU, NVME, replace(CPU, ranks=2)):
        options = {"residency": residency.kind, "offload": residency.offload, "ranks_per_shard": residency.ranks}
        chosen = plan(machine, LONG, shards=1, **options)
        assert (chosen.residency, chosen.reason, chosen.chunks.few) == (residency, "", residency != RESIDENT)
        each = worker_memory(BLOCKS, chosen.spans[0], 1, LONG, residency, chosen.chunks, machine == GPUS, 1)
        assert (chosen.spans, chosen.memory) == (cut(BLOCKS, 1), (each,))
        assert each.total == sum(getattr(each, kind) for kind in kinds)  # on the device
    assert [plan(CORES, **ZERO).residency, plan(CORES, ranks_per_shard=2).residency] == [
        CPU,
        replace(CPU, ranks=2),
    ]


def test_error_of_a_model_that_does_not_fit() -> None:
    line = rf"pipeline\.residency: resident: 'big' does not fit: {LACK} per worker; take auto"
    assert re.fullmatch(line, str(refused(SHORT, residency="resident")))
    line = f"does not fit: {LACK} per worker; zero/cpu {LACKS}; take [^/]*"  # only the required offload
    assert re.fullmatch(line, refused(replace(SHORT, host_memory=HOST - 1), offload="cpu").remedy)
    nowhere = gpus(5 * GIB)
    assert re.search(f"{LACK} per worker; zero/cpu needs .*; zero/nvme needs .*; take", refused(nowhere).remedy)
    assert (refused(nowhere).key, refused(nowhere, **ZERO).key) == ("model.path", "pipeline.residency")
    with pytest.raises(SpecError, match=r"pipeline.ranks_per_shard: 2: .* need 4 GPUs, there are 2: take fewer"):
        plan(GPUS, shards=2, ranks_per_shard=2)


def test_error_of_a_disk_that_is_too_small() -> None:
    assert [plan(replace(SHORT, disk=disk), offload="nvme").residency for disk in (DISK, None)] == [NVME, NVME]
    assert "GiB disk" in str(refused(replace(SHORT, disk=DISK - 1), offload="nvme"))
    assert "GiB disk" in str(refused(replace(GPUS, disk=DISK - 1), offload="nvme", ranks_per_shard=2))


def test_layers_of_a_shard_are_on_one_node() -> None:
    alone = replace(GPUS, nodes=2, disk=DISK - 1)
    assert "GiB disk" in str(refused(alone, shards=1, offload="nvme", **ZERO))


@BOTH
def test_worker_memory_is_a_limit(machine: Machine) -> None:
    need = device(plan(machine))
    assert plan(machine, worker_memory=need).residency == RESIDENT
    assert plan(SHORT, worker_memory=need).residency == CPU
    assert plan(machine, worker_memory=need - 1).residency != RESIDENT
    assert "of 2 GiB per worker" in str(refused(machine, residency="resident", worker_memory="2GiB"))


def test_a_limit_above_every_need_changes_nothing() -> None:
    machine = replace(CORES, host_memory=offloaded(plan(CORES, BRIEF, UNEVEN, shards=2)))
    plans = [plan(machine, BRIEF, UNEVEN, shards=2, worker_memory=limit) for limit in (None, BIG)]
    assert [chosen.residency for chosen in plans] == [RESIDENT, RESIDENT]


def test_workers_share_gpus_and_nodes() -> None:
    need, parts = device(plan(GPUS, shards=4)), [part.total for part in plan(CORES, shards=4).memory]
    shared, node = gpus(need, workers=4), max(sum(parts[:2]), sum(parts[2:]))
    assert 2 * need <= shared.gpu_memory
    for machine in (shared, replace(gpus(need), nodes=2), replace(CORES, nodes=2, host_memory=node)):
        assert plan(machine, shards=4).residency == RESIDENT
        less = replace(machine, gpu_memory=machine.gpu_memory - 1, host_memory=machine.host_memory - 1)
        refused(less, shards=4, residency="resident")
    two_ranks = replace(GPUS, host_memory=2 * offloaded(plan(GPUS, ranks_per_shard=2)))
    assert plan(two_ranks, ranks_per_shard=2).residency.offload == "cpu"
    assert (
        plan(replace(two_ranks, host_memory=two_ranks.host_memory - 1), ranks_per_shard=2).residency.offload
        == "nvme"
    )


@pytest.mark.parametrize(("nodes", "gpus", "ranks", "shards"), AUTO)
def test_auto_shards_use_all_gpus(nodes: int, gpus: int, ranks: int, shards: int) -> None:
    assert len(plan(replace(GPUS, nodes=nodes, gpus=gpus), ranks_per_shard=ranks).spans) == shards


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**34), st.integers(0, 2**30), st.sampled_from([1, 2]))
def test_a_chunk_under_zero_uses_the_free_memory(spare: int, more: int, ranks: int) -> None:
    options: dict[str, Any] = {**ZERO, "shards": 1, "ranks_per_shard": ranks}
    small = gpus(device(plan(GPUS, **options)) + spare)
    chosen, other = (plan(replace(small, gpu_memory=small.gpu_memory + n), LONG, **options) for n in (0, more))
    assert MICRO_BATCH_TOKENS <= chosen.chunks.limit <= other.chunks.limit <= 10**8
    room = planner.device_bytes(small, ranks, PipelineSpec()) - device(chosen)
    assert 0 <= room < (MICRO_BATCH_TOKENS * BLOCKS.token_bytes if chosen.chunks.limit < 10**8 else BIG)


def test_chunks_between_shards_leave_most_of_the_host_free() -> None:
    hosts = (replace(GPUS, host_memory=count * GIB) for count in (6, 7, 8))
    limits = [plan(host, LONG, **ZERO, offload="nvme").chunks.limit for host in hosts]
    assert limits == sorted(set(limits))
    assert 2 * limits[0] * BLOCKS.token_bytes < 3 * GIB


def test_without_gpus_a_chunk_is_what_fits_or_a_micro_batch() -> None:
    for model, spare, compared in ((BLOCKS, GIB, int.__gt__), (UNEVEN, 0, int.__eq__)):  # one is over its share
        tight = replace(CORES, host_memory=offloaded(plan(CORES, BRIEF, model, **ZERO, shards=2)) + spare)
        assert compared(plan(tight, LONG, model, **ZERO, shards=2).chunks.limit, MICRO_BATCH_TOKENS)


@pytest.mark.parametrize("wrong", NONSENSE)
def test_invalid_options_are_rejected_by_key(wrong: str) -> None:
    plain, settings = {"search": {"score": ["wanda"], "sparsity": [0.5]}}, ("residency=resident", wrong)
    with pytest.raises(SpecError, match=rf"^pipeline\.{wrong.split('=')[0]}: "):
        parse_spec(apply_assignments(plain, [f"pipeline.{setting}" for setting in settings]))
