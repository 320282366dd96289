"""ZeRO: offloaded weights give bit-identical results, move once per pass, and are never all in memory."""

import functools
import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlprune.data.batches import MICRO_BATCH_TOKENS, Batch, RowSet
from mlprune.errors import WorkerLostError
from mlprune.models.offload_folder import OffloadFolder
from mlprune.models.replay import ReplayModel
from mlprune.models.residency import SINGLE_RANK, Ranks
from mlprune.models.source import ModelSource
from mlprune.models.zero import ALIGNMENT, Layout, Offload, Zero, open_rendezvous
from mlprune.planning.memory import Chunks
from mlprune.shards.pipeline import Pipeline, in_order
from mlprune.shards.worker import ShardWorker
from mlprune.sweep.masks import make_masks
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.session import open_replicas
from tests.test_pipeline import Outcome, outcome
from tests.tiny_models import source
from tests.work import SEQUENTIAL, SPARSE_2_4, WANDA, masks_of, needs_libaio, opened, ready

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACES = [pytest.param("cpu"), pytest.param("nvme", marks=needs_libaio)]
needs_gpus = pytest.mark.skipif(0 < torch.cuda.device_count() < 4, reason="each rank needs a GPU of its own")


def bits(weights: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {n: (w.dtype, w.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()) for n, w in weights.items()}


def offloaded(storage: Path, place: str, model: ModelSource | None = None, **pipeline: Any) -> Prepared:
    return ready(storage, model, pipeline={"residency": "zero", "offload": place, **pipeline})


def computed(prepared: Prepared) -> tuple[Outcome, list[Any]]:
    """Return the results, and the weights masked and dense.

    All weights are kept until the last are read, because a buffer that is used again would change the first.
    """
    with opened(prepared) as pipeline:
        results = outcome(prepared, pipeline)
        make_masks(prepared, pipeline, SPARSE_2_4)
        dense = {name: data for piece in pipeline.weights(None) for name, data in piece.items()}
        return results, [bits(weights) for weights in (masks_of(prepared, pipeline, SPARSE_2_4), dense)]


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda *model: computed(ready(tmp_path_factory.mktemp("resident"), source(*model))))


CPU = ["llama 1 float32", "llama 2 bfloat16", "gpt2 2 float32", "mixtral 1 float32", "bloom 2 float32"]
NVME = ["llama 2 float32", "llama 1 bfloat16", "mixtral 2 float32"]
FORMS = [f"cpu {form}" for form in CPU] + [pytest.param(f"nvme {form}", marks=needs_libaio) for form in NVME]


@pytest.mark.parametrize("form", FORMS)
def test_offloaded_weights_give_bit_identical_results(form: str, resident: Any, tmp_path: Path) -> None:
    place, family, shards, dtype = form.split()
    prepared = offloaded(tmp_path, place, source(family, dtype), shards=int(shards))
    assert (str(prepared.plan.residency), len(prepared.spans)) == (f"zero/{place}", int(shards))
    results = computed(prepared)
    assert results == resident(family, dtype)
    assert {kind for weights in results[1] for kind, _ in weights.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("place", PLACES)
def test_each_chunk_prefetches_each_layer_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[int, int, int]] = []  # the layer that works, all fetches, and pending ones
    run, prepared = ReplayModel.run, offloaded(tmp_path, place)
    chunks, evaluation = Chunks(2 * MICRO_BATCH_TOKENS, few=True), prepared.suite.rows
    count = len(list(chunks.split(evaluation.batches, 1, masked=True)))
    assert 1 < count < len(evaluation.batches)
    with opened(prepared) as pipeline:
        zero = pipeline._workers[0]._residency  # type: ignore[attr-defined]
        layers, swapper = list(zero._layers.values()), flats(zero)[0].nvme_swapper

        def running(model: ReplayModel, layer: nn.Module, *arguments: Any) -> Tensor:
            pending = swapper.pending_reads if swapper else zero._prefetched is not None
            events.append((layers.index(layer), zero.fetches.total(), pending))
            return run(model, layer, *arguments)

        monkeypatch.setattr(ReplayModel, "run", running)
        pipeline.gather([prepared.set_of("translation:en-fr")])  # many micro-batches, in one chunk
        make_masks(prepared, pipeline, SEQUENTIAL)
        pipeline._chunks = chunks
        pipeline.likelihood(evaluation, SEQUENTIAL.key)
        assert zero.fetches == dict.fromkeys(range(4), 2 + count)
    one_pass = [(0, 2, 1), (1, 3, 1), (2, 4, 1), (3, 4, 0)]
    passes = [(layer, 4 * turn + sent, pending) for turn in range(2 + count) for layer, sent, pending in one_pass]
    assert [event for event, _ in itertools.groupby(events)] == passes


def layer(index: int) -> nn.Module:
    """Make layer `index`: always the same, no two of one size. Its norm has another dtype and stays resident."""
    torch.manual_seed(index)
    linear = nn.Linear(33, 24 + index), nn.Linear(24 + index, 700, bias=False)
    return nn.Sequential(*linear, nn.LayerNorm(700).bfloat16()).requires_grad_(False)


def packed(index: int) -> Tensor:
    dense, layout = layer(index), Layout.of(layer(index), torch.float32)
    flat = torch.zeros(layout.elements)
    for name, view in layout.views(flat):
        view.copy_(dense.get_parameter(name))
    return flat


def flats(zero: Zero) -> dict[int, Any]:
    """Return DeepSpeed's parameters by layer, untyped: tests look at what the protocol does not name."""
    return dict(zero._flats)


def held(folder: Path, place: Any, layers: Iterable[Any] = (), ranks: Ranks = SINGLE_RANK) -> closing[Zero]:
    layers = layers or ((index, layer(index)) for index in range(4))
    return closing(Zero(layers, torch.float32, DEVICE, Offload(place, folder, len(packed(3))), ranks))


def is_right(zero: Zero, index: int, prefetch: int | None) -> bool:
    with zero.borrow(index, prefetch) as borrowed:
        return bits(borrowed.state_dict()) == bits(layer(index).state_dict())


def is_empty(layer: nn.Module) -> bool:
    return not any(parameter.numel() for parameter in layer.parameters() if parameter.dtype == torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_layers_are_borrowed_in_any_order_and_released_after_a_failure_too(place: str, tmp_path: Path) -> None:
    with held(tmp_path, place) as zero:
        # right hints, wrong hints and none; a layer twice; at the end a prefetch that is never used
        for index, prefetch in [(0, 1), (1, 2), (0, 3), (3, 0), (1, None), (1, 2), (1, 0), (3, 2)]:
            assert is_right(zero, index, prefetch)
            assert all(is_empty(layer) for layer in zero._layers.values())
            in_memory = {n for n, flat in zero._flats.items() if flat.numel()}
            assert in_memory <= {prefetch}, "a layer that nobody needs is in memory"
        for index in (0, 2, 2):
            with pytest.raises(ZeroDivisionError), zero.borrow(index, prefetch=index + 1):
                raise ZeroDivisionError
            assert is_empty(zero._layers[index])
        assert all(is_right(zero, index, prefetch) for index, prefetch in [(0, 1), (1, 2), (2, 3), (3, 1)])


@pytest.mark.parametrize("place", PLACES)
def test_layers_are_offloaded_one_at_a_time(place: str, tmp_path: Path) -> None:
    in_memory: list[int] = []  # elements of all large tensors of this process

    def one_by_one() -> Iterator[tuple[int, nn.Module]]:
        for index in (1, 3):
            dense = layer(index)
            yield index, dense
            assert is_empty(dense), "the next layer is requested while this one is still in memory"
            gc.collect()
            large: list[Any] = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() > 9999]
            sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in large}
            in_memory.append(sum(sizes.values()))

    with held(tmp_path, place, one_by_one()):
        assert in_memory[1] - in_memory[0] == (len(packed(3)) if place == "cpu" else 0)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=3), DTYPES), max_size=8), DTYPES)
def test_each_parameter_of_the_dtype_has_its_own_aligned_slot(shapes: Any, dtype: torch.dtype) -> None:
    parameters = nn.ParameterList(nn.Parameter(torch.zeros(size, dtype=kind)) for size, kind in shapes)
    layout = Layout.of(parameters, dtype)
    views = dict(layout.views(torch.zeros(layout.elements, dtype=dtype)))
    expected = {name: data.shape for name, data in parameters.named_parameters() if data.dtype == dtype}
    assert {name: view.shape for name, view in views.items()} == expected
    for view in views.values():
        assert view.storage_offset() * dtype.itemsize % ALIGNMENT == 0
        assert not view.any(), "another parameter has this slot"
        view.fill_(1)


def arrives(data: Tensor, expected: Tensor) -> bool:
    end = time.monotonic() + 20
    while not torch.equal(data, expected) and time.monotonic() < end:
        time.sleep(0.01)
    return torch.equal(data, expected)


@needs_libaio
def test_weights_are_on_the_disk_and_arrive_while_another_layer_works(tmp_path: Path) -> None:
    with held(tmp_path, "nvme") as zero:
        for index, flat in flats(zero).items():
            (file,) = tmp_path.rglob(f"{flat.ds_id}_*.swp")
            assert file.read_bytes().startswith(packed(index).numpy().tobytes())
        swapper, next_id, expected = flat.nvme_swapper, flats(zero)[1].ds_id, packed(1)
        swapper.buffers.zero_()  # they still hold the layers that were offloaded through them
        with zero.borrow(0, prefetch=1):
            buffer = swapper.param_id_to_swap_buffer[next_id][: len(expected)]
            assert arrives(buffer, expected)
            assert swapper.pending_reads == 1, "the prefetch was waited for"
    assert not list(tmp_path.rglob("*.swp"))


def test_folder_of_a_killed_process_is_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    imports = "import time, pathlib; from mlprune.models.offload_folder import OffloadFolder"
    make = f"owner = OffloadFolder(pathlib.Path({str(tmp_path)!r}))"
    code = f"{imports}; {make}; (owner.path / 'weights').touch(); print(owner.path, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        left = Path((process.stdout or sys.stdin).readline().strip())
        OffloadFolder(tmp_path).close()
        kept = (left / "weights").exists()
        process.kill()
    own, other = OffloadFolder(tmp_path), OffloadFolder(tmp_path)
    own.close()
    assert (kept, left.exists(), own.path.exists(), other.path.exists()) == (True, False, False, True)
    other.close()


def test_folder_that_disappears_meanwhile_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / "shard-gone"]))
    own = OffloadFolder(tmp_path)
    own.close()
    assert not own.path.exists()


@needs_libaio
def test_failed_load_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        held(tmp_path, "nvme", ([(0, layer(0))][index] for index in range(2)))
    assert not list(tmp_path.rglob("*.swp"))


def half(rank: int, address: str, folder: Path) -> list[int]:
    with held(folder, "cpu", ranks=Ranks(rank, 2, address)) as zero:
        order = [(0, 1), (1, 3), (0, None), (2, 3), (3, None)]
        assert all(is_right(zero, index, prefetch) for index, prefetch in order)
        flat, expected = flats(zero)[1], packed(1) + 1
        flat.ds_tensor.add_(1)  # values that were never complete in any memory
        with zero.borrow(0, prefetch=1):
            assert arrives(flat.data, expected)
            assert flat.ds_status.name == "INFLIGHT", "the prefetch was waited for"
        return [flat.ds_tensor.numel() for flat in flats(zero).values()]


@needs_gpus
def test_each_rank_holds_its_part_and_prefetches_layers(tmp_path: Path) -> None:
    _store, address = open_rendezvous("127.0.0.1", 2)
    with get_context("spawn").Pool(2) as pool:
        sizes = pool.starmap(half, [(rank, address, tmp_path) for rank in range(2)], chunksize=1)
    assert sizes == [[len(packed(index)) // 2 for index in range(4)]] * 2


def assert_alike(actual: Outcome, expected: Outcome) -> None:
    """Each rank sums the moments of its share in float64, so only the last digits may differ."""
    assert (actual.masks, actual.likelihoods) == (expected.masks, expected.likelihoods)
    for (name, (tokens, sums)), (other, seen) in zip(
        actual.moments.items(), expected.moments.items(), strict=True
    ):
        assert (name, tokens) == (other, seen[0])
        assert list(memoryview(sums).cast("d")) == pytest.approx(memoryview(seen[1]).cast("d"), rel=1e-12, abs=0)


@needs_gpus
@pytest.mark.usefixtures("ray_cluster")
def test_ranks_give_the_results_of_one_and_a_lost_rank_is_replaced(resident: Any, tmp_path: Path) -> None:
    prepared = offloaded(tmp_path, "cpu", shards=2, ranks_per_shard=2)
    batch = prepared.set_of("mono:hi").batches[0]
    with open_replicas(prepared) as replicas:
        pipeline = replicas.pipelines[0]
        assert_alike(outcome(prepared, pipeline), resident("llama", "float32")[0])
        for batches in ([batch, None], [batch, batch]):  # None kills the second rank; after that it is dead
            future = pipeline.call_with_hidden(0, ShardWorker.forward, None, cast(list[Batch], batches))
            assert ray.wait([future.first], timeout=120)[0], "the call hangs"
            with pytest.raises(WorkerLostError):
                pipeline.get(future)
        replicas.repair()
        assert_alike(outcome(prepared, replicas.pipelines[0]), resident("llama", "float32")[0])


@needs_libaio
@needs_gpus
@pytest.mark.usefixtures("ray_cluster")
def test_ranks_over_a_disk_give_the_results_of_one_even_without_work(resident: Any, tmp_path: Path) -> None:
    prepared = offloaded(tmp_path, "nvme", ranks_per_shard=2)
    small = prepared.set_of("mono:hi").batches[0]
    large = Batch(small.input_ids.repeat(64, 1), small.lengths * 64, small.rows * 64)
    with opened(prepared, over_ray=True) as pipeline:
        assert_alike(outcome(prepared, pipeline), resident("llama", "float32")[0])
        results = one_micro_batch_results(prepared, pipeline)
        pipeline.call_with_hidden(
            0, ShardWorker.likelihood, None, [small, large]
        )  # the second rank is not waited for
    with opened(ready(tmp_path / "resident")) as pipeline:
        assert results == one_micro_batch_results(prepared, pipeline)
    assert not list(tmp_path.rglob("*.swp")), "closing did not wait for the second rank"


def one_micro_batch_results(prepared: Prepared, pipeline: Pipeline) -> list[Any]:
    calibration, evaluation = prepared.set_of("translation:en-fr"), prepared.suite.rows
    short = replace(calibration, batches=calibration.batches[:1])
    pipeline.gather([short])
    sequential = pipeline.prune_sequentially(prepared.recipe(SEQUENTIAL), [short])
    first = evaluation.batches[0]
    first = replace(first, rows=tuple(range(len(first.rows))))
    likelihood = pipeline.likelihood(RowSet(len(first.rows), (first,), "first"))
    return [pipeline.prune(prepared.recipe(WANDA)), sequential, likelihood]


def test_items_shared_among_ranks_are_merged_in_order() -> None:
    for count, size in itertools.product(range(13), range(1, 6)):
        items = [torch.tensor(number) for number in range(count)]
        assert in_order([items[rank::size] for rank in range(size)]) == items
