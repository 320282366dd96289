"""Masks that workers keep between the stages of a sweep: they are the same masks, within the planned memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlprune.pruning.masks import PackedMask
from mlprune.shards.kept_masks import KeptMasks
from mlprune.sweep import trial
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.trial import run_trial
from tests.work import SEQUENTIAL, SPARSEGPT, WANDA, masks_of, opened, ready

CPU = torch.device("cpu")


def mask(size: int) -> PackedMask:
    return PackedMask.pack(torch.rand(8, size) > 0.5)


def test_those_that_were_used_last_stay() -> None:
    kept = KeptMasks(limit=3 * 16)  # three masks of 8 x 16 bits
    masks = {name: {0: {"q": mask(16)}} for name in "abcd"}
    for name in "abc":
        kept.put(name, masks[name], [])
    assert kept.take("a", CPU) is not None
    kept.put("a", masks["a"], [])
    kept.put("d", masks["d"], [])
    assert kept.take("b", CPU) is None, "it was used longest ago"
    for name in "acd":
        taken = kept.take(name, CPU)
        assert taken is not None
        assert taken[0][0]["q"].digest() == masks[name][0]["q"].digest()
        assert kept.take(name, CPU) is None, "it is in use now"


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    kept = KeptMasks(limit=100)
    kept.put("small", {0: {"q": mask(16)}}, [])
    kept.put("large", {0: {"q": mask(1000)}}, [])
    assert kept.take("large", CPU) is None


@pytest.mark.parametrize("shards", [1, 3])
def test_a_later_trial_uses_the_same_masks(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ready(tmp_path, shards=shards, search={**SEARCH, "racing": True})
    assert prepared.plan.kept_masks > 0
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        for variant in (WANDA, SEQUENTIAL, SPARSEGPT):
            first, items = run_trial(prepared, pipeline, variant, prepared.suite)
            with monkeypatch.context() as patched:
                patched.delattr(trial, "make_masks")
                second, again = run_trial(prepared, pipeline, variant, prepared.suite)
            assert (second.digest, again) == (first.digest, items)
            lasting = {name for name in first.metrics if not name.startswith("seconds")}
            assert {n: first.metrics[n] for n in lasting} == {n: second.metrics[n] for n in lasting}


def test_masks_that_one_shard_lost_are_made_again(tmp_path: Path) -> None:
    prepared = ready(tmp_path, shards=2, search={**SEARCH, "racing": True})
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        first, _ = run_trial(prepared, pipeline, WANDA, prepared.suite)
        worker = pipeline._workers[1]  # type: ignore[attr-defined]
        worker._kept.clear()
        second, _ = run_trial(prepared, pipeline, WANDA, prepared.suite)
        assert second.digest == first.digest
        assert pipeline.reuse(WANDA.key) is not None
        assert masks_of(prepared, pipeline, WANDA)


def test_a_failed_trial_keeps_nothing(tmp_path: Path) -> None:
    prepared = ready(tmp_path, search={**SEARCH, "racing": True})

    class BrokenSuite:
        key = "broken"

        def run(self, *_: object) -> None:
            raise RuntimeError

    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        with pytest.raises(RuntimeError):
            run_trial(prepared, pipeline, WANDA, BrokenSuite())  # type: ignore[arg-type]
        assert pipeline.reuse(WANDA.key) is None


SEARCH = {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5]}


def test_memory_for_them_is_planned_where_stages_need_it(tmp_path: Path) -> None:
    plain, raced = ready(tmp_path).plan, ready(tmp_path, search={**SEARCH, "racing": True}).plan
    screened = ready(tmp_path, search={**SEARCH, "screen": 1}).plan
    assert (plain.kept_masks, screened.kept_masks) == (0, raced.kept_masks)
    (memory,), (with_kept,) = plain.memory, raced.memory
    assert with_kept == replace(memory, masks=memory.masks + raced.kept_masks)
    limited = {"shards": 1, "worker_memory": memory.total + 1000}
    tight = ready(tmp_path, pipeline=limited, search={**SEARCH, "racing": True}).plan
    assert tight.kept_masks == 1000
