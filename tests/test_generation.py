"""Greedy continuation, against Hugging Face's own `generate` on the whole model, one prompt at a time."""

import functools
import gc
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlprune.models import residency
from mlprune.models.cache import KeyValues
from mlprune.models.hollow import FAMILIES, Span
from mlprune.models.quiet import quiet_transformers
from mlprune.models.replay import ReplayModel
from mlprune.models.source import ModelSource
from mlprune.planning.memory import Chunks
from mlprune.shards import decoding
from mlprune.shards.decoding import Session, Step, grouped, waves
from mlprune.shards.pipeline import LocalPipeline
from mlprune.shards.worker import Setup, ShardWorker
from mlprune.storage.files import Storage
from mlprune.storage.moments import MomentStore
from mlprune.sweep.masks import make_masks
from tests.tiny_models import config, save
from tests.work import RANDOM, masks_of, opened, ready

NEW = 12
LENGTHS = (5, 30, 1, 17, 30, 22, 9)  # some within the sliding window of 16, where there is one, some beyond
LONGEST_FIRST = sorted(range(len(LENGTHS)), key=lambda row: -LENGTHS[row])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 384, (length,), generator=generator).tolist() for length in LENGTHS]


@functools.cache
def untied(family: str = "llama") -> ModelSource:
    """A model that does not write one token for ever, as tied random weights do."""
    folder = Path(tempfile.mkdtemp(prefix=f"mlprune-untied-{family}-"))
    window = {"sliding_window": 16} if family in ("mistral", "mixtral", "phi3") else {}
    return save(config(family, tie_word_embeddings=False, **window), folder)


@dataclass
class Generated:
    """What the whole model says of a prompt."""

    tokens: list[int]
    logits_TV: Tensor


@torch.inference_mode()
def whole_model_output(source: ModelSource, weights: Mapping[str, Tensor] | None = None) -> list[Generated]:
    with quiet_transformers():
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(source.folder, experts_implementation="eager").eval()
        if weights is not None:
            model.load_state_dict(weights)
        model.generation_config.eos_token_id = None
        options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True}
        generated = []
        for prompt in prompts():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **options)
            generated.append(Generated(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)))
    return generated


@functools.cache
def expected() -> list[list[int]]:
    return [generated.tokens for generated in whole_model_output(untied())]


@contextmanager
def pipeline_of(source: ModelSource, folder: Path, shards: int = 1) -> Iterator[LocalPipeline]:
    ends = [4 * n // shards for n in range(shards + 1)]
    setup = Setup(source, "float32", "cpu", MomentStore(Storage(str(folder)), "any", "float32"))
    workers = [ShardWorker(setup, Span(a, b, 4)) for a, b in pairwise(ends)]
    pipeline = LocalPipeline(workers, Chunks(2**20, few=False))
    try:
        yield pipeline
    finally:
        pipeline.close()


def never(row: int, tokens: Sequence[int]) -> bool:
    return False


def early(row: int, tokens: Sequence[int]) -> bool:
    """Ends each row after other lengths: the longest prompts first, and one row never."""
    return len(tokens) == 2 + 2 * LONGEST_FIRST.index(row)


def cut(written: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(tokens[: 2 + 2 * LONGEST_FIRST.index(row)]) for row, tokens in enumerate(written)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of three rows, two of them at a time, in micro-batches of one row or two."""
    monkeypatch.setattr(decoding, "GROUP_ROWS", 3)
    monkeypatch.setattr(decoding, "CACHED_TOKENS", 210)
    monkeypatch.setattr(decoding, "MICRO_BATCH_TOKENS", 60)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_the_whole_model_generates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = whole_model_output(untied(family))
    apart = min(float((one.logits_TV[1:] - one.logits_TV[:-1]).abs().amax(1).min()) for one in generated)
    assert apart > 0.01, "a model that says the same at every step proves nothing"
    logits, seen = ReplayModel.logits, list[Tensor]()

    def noting(self: ReplayModel, hidden_BTH: Tensor) -> Tensor:
        seen.append(logits(self, hidden_BTH))
        return seen[-1]

    monkeypatch.setattr(ReplayModel, "logits", noting)
    for shards in (1, 2):
        seen.clear()
        with pipeline_of(untied(family), tmp_path, shards) as pipeline:
            assert pipeline.generate(prompts(), NEW, never) == [one.tokens for one in generated], shards
        logits_BTV = torch.stack([generated[row].logits_TV for row in LONGEST_FIRST])  # all rows are one group
        torch.testing.assert_close(torch.cat(seen, 1), logits_BTV, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shards", [1, 3])
def test_output_does_not_depend_on_groups_waves_and_micro_batches(shards: int, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    with pipeline_of(untied(), tmp_path, shards) as pipeline:
        written = pipeline.generate(prompts(), NEW, never, progress=lambda done, all: steps.append((done, all)))
        assert pipeline.generate([], NEW, never) == []
    assert written == expected()
    assert [steps[n] for n in (0, NEW - 1, -1)] == [(0, 7), (6, 7), (7, 7)]
    assert len(steps) == 2 * NEW


def test_groups_hold_similar_lengths_and_waves_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROUP_ROWS", 5)
    monkeypatch.setattr(decoding, "CACHED_TOKENS", 1000)
    generator = torch.Generator().manual_seed(8)
    lengths = [*torch.randint(1, 150, (60,), generator=generator).tolist(), 1100]
    groups = grouped([[7] * length for length in lengths], 50)
    rows = [row for group in groups for row in group.written]
    assert sorted(rows) == list(range(61))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert max(len(group.written) for group in groups) == 5
    made = list(waves(groups))
    assert [group for wave in made for group in wave] == groups
    held = [sum(len(group.written) * group.capacity for group in wave) for wave in made]
    assert held[0] == 1149, "what does not fit passes alone"
    assert max(held[1:]) <= 1000
    assert max(len(wave) for wave in made) > 1


@pytest.mark.usefixtures("small")
def test_ended_groups_are_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[list[int]] = []
    calls: list[tuple[int, int]] = []
    decode = Session.decode

    def noting(self: Session, steps: Sequence[Step], hidden: Any) -> list[Tensor]:
        passed.append([step.group for step in steps])
        return decode(self, steps, hidden)

    def ended(row: int, tokens: Sequence[int]) -> bool:
        calls.append((row, len(tokens)))
        return early(row, tokens)

    monkeypatch.setattr(Session, "decode", noting)
    with pipeline_of(untied(), tmp_path) as pipeline:
        assert pipeline.generate(prompts(), NEW, ended) == cut(expected())
    # rows end after 2, 4, 6 | 8, 10, 12 | 12 tokens, and the third group waits for a place
    assert passed == [[0, 1]] * 6 + [[1]] * 6 + [[2]] * 12
    assert len(calls) == len(set(calls)) == 2 + 4 + 6 + 8 + 10 + 12 + 12


def test_a_masked_model_generates_what_its_checkpoint_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, made, masked = ready(tmp_path, untied(), shards=2), list[Any](), residency.masked

    def counting(*given: Any) -> dict[str, Tensor]:
        made.append(given)
        return masked(*given)

    with opened(prepared) as pipeline:
        make_masks(prepared, pipeline, RANDOM)
        generated = [one.tokens for one in whole_model_output(untied(), masks_of(prepared, pipeline, RANDOM))]
        monkeypatch.setattr(residency, "masked", counting)
        assert pipeline.generate(prompts(), NEW, never, RANDOM.key) == generated != expected()
        assert len(made) == 4, "each layer is masked once, not once a token"
        assert pipeline.generate(prompts(), NEW, never) == expected(), "the dense weights are as they were"


@pytest.mark.usefixtures("ray_cluster")
def test_actors_and_ranks_generate_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROUP_ROWS", 2)  # four groups for two ranks, the first of which ends first
    held = {"residency": "zero", "offload": "cpu", "ranks_per_shard": 2}
    prepared, alone = ready(tmp_path / "a", untied(), shards=2, pipeline=held), ready(tmp_path / "b", untied())
    with opened(alone) as pipeline:
        make_masks(alone, pipeline, RANDOM)
        masked = pipeline.generate(prompts(), NEW, early, RANDOM.key)
    with opened(prepared, over_ray=True) as pipeline:
        make_masks(prepared, pipeline, RANDOM)
        assert pipeline.generate(prompts(), NEW, early, RANDOM.key) == masked
        assert pipeline.generate(prompts(), NEW, early) == cut(expected())


# what is kept goes


@pytest.mark.parametrize("fails", [None, "ended", "run"])
def test_caches_are_released_at_the_end_and_after_an_error(
    fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: weakref.WeakSet[KeyValues] = weakref.WeakSet()
    like, run, calls = KeyValues.of_layer, ReplayModel.run, list[int]()

    def noting(self: KeyValues, *given: Any) -> Any:
        kept.add(self)
        return like(self, *given)

    def running(self: ReplayModel, *given: Any) -> Tensor:
        calls.append(len(kept))
        if fails == "run" and len(calls) == 11:
            raise RuntimeError("run")
        return run(self, *given)

    def ended(row: int, tokens: Sequence[int]) -> bool:
        if fails == "ended" and len(tokens) == 3:
            raise RuntimeError("ended")
        return False

    monkeypatch.setattr(KeyValues, "of_layer", noting)
    monkeypatch.setattr(ReplayModel, "run", running)
    with pipeline_of(untied(), tmp_path, 2) as pipeline:
        if fails:
            with pytest.raises(RuntimeError, match=fails):
                pipeline.generate(prompts(), NEW, ended)
        else:
            pipeline.generate(prompts(), NEW, ended)
        assert max(calls) == 2, "one in each shard"
        assert not any(worker._sessions for worker in pipeline._workers)
        gc.collect()
        assert not kept


def test_copies_of_masked_experts_are_released_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[weakref.ref[torch.nn.Parameter]] = []
    copied = decoding._masked_copy

    def noting(*given: Any) -> torch.nn.Module:
        layer = copied(*given)
        weights.extend(weakref.ref(parameter) for parameter in layer.parameters())
        return layer

    monkeypatch.setattr(decoding, "_masked_copy", noting)
    prepared = ready(tmp_path, untied("mixtral"))
    with opened(prepared) as pipeline:
        make_masks(prepared, pipeline, RANDOM)
        gc.disable()
        try:
            pipeline.generate(prompts(), NEW, never, RANDOM.key)
            assert weights
            assert not any(weight() is not None for weight in weights)
        finally:
            gc.enable()


def test_too_many_positions_fail_an_assertion(tmp_path: Path) -> None:
    with pipeline_of(untied(), tmp_path) as pipeline:
        assert len(pipeline.generate([[5] * 500], 12, never)[0]) == 12
        with pytest.raises(AssertionError, match="positions"):
            pipeline.generate([[5] * 500], 14, never)
