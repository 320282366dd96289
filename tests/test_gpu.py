"""The same work on a GPU: results that must not change, and the GPU memory of a worker."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlprune.sweep.masks import gather_moments, make_masks
from tests.test_pipeline import outcome
from tests.tiny_models import source
from tests.work import VARIANTS, WANDA, opened, ready

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.parametrize("pipeline", [{}, {"residency": "zero", "offload": "cpu"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_results_do_not_depend_on_shards_and_residency(
    family: str, pipeline: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = []
    for shards, how in ((1, {}), (3, pipeline)):
        prepared = ready(tmp_path / str(shards), source(family, "bfloat16"), shards, how)
        with opened(prepared) as held:
            outcomes.append(outcome(prepared, held))
    assert outcomes[0] == outcomes[1]


def test_a_gpu_computes_what_the_cpu_computes(tmp_path: Path) -> None:
    """Float32 kernels differ in their last bits, so masks may differ where scores tie: hardly anywhere."""
    here, there = ready(tmp_path / "gpu"), ready(tmp_path / "cpu")
    there = replace(there, machine=replace(there.machine, gpus=0))
    with opened(here) as pipeline:
        gather_moments(here, pipeline, [WANDA])
        on_gpu = make_masks(here, pipeline, WANDA), masks(pipeline)
    with opened(there) as pipeline:
        gather_moments(there, pipeline, [WANDA])
        on_cpu = make_masks(there, pipeline, WANDA), masks(pipeline)
    assert on_gpu[0].dropped == on_cpu[0].dropped
    differing = sum(int((a != b).sum()) for a, b in zip(on_gpu[1], on_cpu[1], strict=True))
    assert differing < on_cpu[0].weights / 1000


def masks(pipeline: Any) -> list[torch.Tensor]:
    (worker,) = pipeline._workers
    return [mask.unpack().cpu() for layer in worker._masks[WANDA.key].values() for mask in layer.values()]


def test_weights_are_float16_and_moments_float64_on_the_gpu(tmp_path: Path) -> None:
    prepared = ready(tmp_path, source("llama", "bfloat16"))
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, VARIANTS)
        (worker,) = pipeline._workers  # type: ignore[attr-defined]
        with worker._residency.borrow(0) as layer:
            held = {(weight.dtype, weight.device.type) for weight in layer.parameters()}
        sums = {(m.sumsq_I.dtype, m.sumsq_I.device.type) for s in worker._moments.values() for m in s[0].values()}
    assert (held, sums) == ({(torch.bfloat16, "cuda")}, {(torch.float64, "cuda")})


def test_the_next_layer_is_prefetched_on_its_own_stream(tmp_path: Path) -> None:
    prepared = ready(tmp_path, pipeline={"residency": "zero", "offload": "cpu"})
    with opened(prepared) as pipeline:
        (worker,) = pipeline._workers  # type: ignore[attr-defined]
        zero = worker._residency
        assert zero._stream is not None
        assert zero._stream != torch.cuda.current_stream()
        assert all(flat.ds_tensor.is_pinned() for flat in zero._flats.values())
