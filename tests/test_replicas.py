"""Places, replicas and what is done when workers die, over real Ray; the policy without it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from mlprune.errors import ModelError, SpecError, SweepError, WorkerLostError
from mlprune.planning.machine import Machine, replica_share
from mlprune.planning.planner import make_plan
from mlprune.planning.work import Work
from mlprune.runtime import nodes as nodes_module
from mlprune.runtime import placement as places
from mlprune.runtime.actors import RayPipeline, pipeline_slot
from mlprune.runtime.nodes import Node, resources_text
from mlprune.runtime.placement import Placement, bundle_for
from mlprune.runtime.replicas import MAX_WORKER_LOSSES, ReplicaGroup
from mlprune.shards.pipeline import MaskOutcome
from mlprune.shards.worker import ShardWorker
from mlprune.spec.schema import PipelineSpec
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.session import open_local, open_replicas
from tests.work import WANDA, masks_of, ready

A, B, C = (parse_variant("mono:en", "wanda", sparsity, "unstructured", "dense") for sparsity in (0.1, 0.2, 0.3))


# plans for replicas and for nodes that are launched


NODE = Machine(nodes=4, gpus=8, gpu_memory=80, host_memory=1000, host_to_device=1.0, flops=1.0, disk=400)


@pytest.mark.parametrize(
    ("replicas", "nodes", "gpus", "memory"),
    [(1, 4, 8, 1000), (2, 2, 8, 1000), (3, 1, 8, 1000), (4, 1, 8, 1000), (8, 1, 4, 500), (9, 1, 2, 333)],
)
def test_a_replica_gets_whole_nodes_or_a_part_of_one(replicas: int, nodes: int, gpus: int, memory: int) -> None:
    share = replica_share(NODE, replicas)
    assert (share.nodes, share.gpus, share.host_memory) == (nodes, gpus, memory)
    assert share.all_gpus * replicas <= NODE.all_gpus


GIB = 2**30


def test_an_elastic_cluster_uses_as_few_nodes_as_hold_the_model(tmp_path: Path) -> None:
    shape = ready(tmp_path).model_size
    work = Work(calibration=(1000,), evaluation=1000, longest=100, variants=4)
    whole = make_plan(shape, work, machine_of(1, 64 * GIB), PipelineSpec(), "m").memory[0].total
    elastic = Machine(4, 2, int(whole * 2), 64 * GIB, 1e9, 1e12, elastic=True)
    assert len(make_plan(shape, work, elastic, PipelineSpec(), "m").spans) == 1
    tight = Machine(4, 2, int(whole / 0.95) - 1, 64 * GIB, 1e9, 1e12, elastic=True)
    plan = make_plan(shape, work, tight, PipelineSpec(replicas=2), "m")
    assert (len(plan.spans), plan.replicas) == (2, 2)
    with pytest.raises(SpecError, match=r"pipeline.replicas: 9: each needs a GPU, and there are 8"):
        make_plan(shape, work, elastic, PipelineSpec(replicas=9), "m")


def machine_of(gpus: int, memory: int) -> Machine:
    return Machine(1, gpus, memory, memory, 1e9, 1e12)


# over real Ray: first what wants CPUs that the replicas would have


def test_a_model_error_is_raised_without_a_retry(ray_cluster: None, tmp_path: Path) -> None:
    prepared = ready(tmp_path, shards=2)
    assert prepared.fingerprint, "made here, while the model is"
    object.__setattr__(prepared.source, "folder", tmp_path / "gone")
    with (
        pytest.raises(ModelError, match="put it on a shared disk, or there on every node"),
        open_replicas(prepared),
    ):
        pass


def test_missing_resources_are_logged_and_named_in_the_error(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes_module, "QUIET_SECONDS", 0.1)
    place = Placement.request(2, {"CPU": 1, "GPU": 1, "memory": float(GIB)})
    try:
        with pytest.raises(
            SpecError, match=r"pipeline.wait_minutes: 0.01: waiting for resources for 2 shard\(s\), "
        ):
            place.wait(0.01)
    finally:
        place.remove()
    assert caplog.text.count("1 CPU, 1 GPU, 1 GiB each; free: ") == 1
    assert resources_text({"CPU": 0.5, "memory": 2.5 * GIB}) == "0.5 CPU, 2.5 GiB"


def test_bundles_share_gpus_evenly_and_fit_on_a_node(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "usable_nodes", lambda: [Node("a", {"CPU": 4.0}), Node("b", {"CPU": 8.0})])
    two = Machine(nodes=2, gpus=2, gpu_memory=GIB, host_memory=GIB, host_to_device=1, flops=1)
    assert bundle_for(two, workers=4, ranks=1, memory=7) == {"CPU": 1, "memory": 7, "GPU": 1}
    assert bundle_for(two, workers=6, ranks=1, memory=7)["GPU"] == 0.5, "three workers on two GPUs: two share one"
    assert bundle_for(two, workers=4, ranks=2, memory=7) == {"CPU": 2, "memory": 14, "GPU": 2}
    none = Machine(nodes=2, gpus=0, gpu_memory=0, host_memory=GIB, host_to_device=1, flops=0)
    assert bundle_for(none, workers=12, ranks=1, memory=7) == {"CPU": 0.6666, "memory": 7}


@pytest.fixture(scope="module")
def replicas(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaGroup]:
    prepared = ready(tmp_path_factory.mktemp("replicas"), shards=2, pipeline={"replicas": 2})
    with open_replicas(prepared) as opened:
        yield opened


def pids(pipeline: RayPipeline) -> list[int]:
    return [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in pipeline.actors]


def kill(pipeline: RayPipeline, shard: int) -> None:
    os.kill(pids(pipeline)[shard], signal.SIGKILL)


def test_only_dead_workers_are_started_again(replicas: ReplicaGroup) -> None:
    before = [pids(pipeline) for pipeline in replicas.pipelines]
    kill(replicas.pipelines[0], 1)
    stale = replicas.pipelines[0]
    with pytest.raises(WorkerLostError, match="a shard's worker"):
        stale.call_all(ShardWorker.ready)
    replicas.repair()
    after = [pids(pipeline) for pipeline in replicas.pipelines]
    assert after[1] == before[1]
    assert after[0][0] == before[0][0]
    assert after[0][1] != before[0][1]
    with pytest.raises(WorkerLostError):
        stale.call_all(ShardWorker.ready)  # an old handle never reaches the new worker, which knows nothing


def test_work_is_repeated_after_a_repair_with_the_same_outcome(replicas: ReplicaGroup, tmp_path: Path) -> None:
    prepared = ready(tmp_path, shards=2)
    deaths = 0

    def work(pipeline: RayPipeline) -> tuple[MaskOutcome, dict[str, Any]]:
        nonlocal deaths
        gather_moments(prepared, pipeline, [WANDA])
        if deaths < MAX_WORKER_LOSSES - 1:
            deaths += 1
            kill(pipeline, deaths - 1)
        return make_masks(prepared, pipeline, WANDA), masks_of(prepared, pipeline, WANDA)

    made, weights = replicas.run_with_retries("work", work)
    with open_local(ready(tmp_path / "plain")) as plain:
        gather_moments(prepared, plain, [WANDA])
        assert make_masks(prepared, plain, WANDA) == made
        expected = masks_of(prepared, plain, WANDA)
    assert weights.keys() == expected.keys()
    assert all(bool((weights[name] == expected[name]).all()) for name in expected)

    def hopeless(pipeline: RayPipeline) -> None:
        kill(pipeline, 0)
        pipeline.call_all(ShardWorker.ready)

    with pytest.raises(SweepError, match="work: a worker died 3 times: a shard's worker"):
        replicas.run_with_retries("work", hopeless)
    replicas.repair()


def test_a_pass_fails_when_a_worker_dies_between_chunks(replicas: ReplicaGroup, tmp_path: Path) -> None:
    """The worker dies idle between two chunks: the pass must fail, not go on with a new worker's zeros."""
    prepared = ready(tmp_path, shards=2)
    pipeline = replicas.pipelines[1]
    seen = 0

    def strike(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            kill(pipeline, 0)
            time.sleep(0.5)

    made = prepared.set_of("mono:hi")
    with pytest.raises(WorkerLostError):
        pipeline.gather([made], strike)
    assert not any(
        prepared.moment_store().has(made.key, layer) for layer in range(len(prepared.model_size.layers))
    )
    replicas.repair()


def test_a_replica_has_as_many_slots_as_planned_and_a_broken_group_has_none(replicas: ReplicaGroup) -> None:
    first, second = replicas.pipelines
    room = first._slots
    entered = [first.acquire_slot(f"t{number}") for number in range(room + 1)]
    assert entered == [True] * room + [False]
    assert first.acquire_slot("t0"), "who is in is in"
    with pipeline_slot([first, second], "other") as chosen:
        assert chosen is second
    first.release_slot("t0")
    with pipeline_slot([first, second], "other") as chosen:
        assert chosen is first
    kill(second, 1)
    with pytest.raises(WorkerLostError) as lost, pipeline_slot([second, first], "late"):
        pass
    assert lost.value.not_started
    replicas.repair()
