"""One suite for both pipelines. Invariant 1: results are bit-identical for any number and place of shards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlprune.data.batches import Batch, RowSet
from mlprune.models.hollow import Span
from mlprune.models.replay import ReplayModel
from mlprune.models.residency import Resident
from mlprune.planning.memory import DENSE_CHUNKS, LOGIT_TOKENS, Chunks
from mlprune.shards.pipeline import Future, MaskOutcome, Pipeline
from mlprune.shards.worker import ShardWorker
from mlprune.spec.variants import Variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.trial import run_trial
from tests.tiny_models import config, save, source
from tests.work import MIXED_SEQUENTIAL, SEQUENTIAL, VARIANTS, WANDA, opened, ready

FORMS = [(1, False), (2, False), (4, False), (1, True), (3, True)]


@dataclass
class Outcome:
    """All that a pipeline computed."""

    moments: dict[str, tuple[int, bytes]]
    masks: dict[str, MaskOutcome]
    likelihoods: dict[str, list[float]]


def outcome(prepared: Prepared, pipeline: Pipeline) -> Outcome:
    gather_moments(prepared, pipeline, VARIANTS)
    masks, likelihoods = {}, {"dense": pipeline.likelihood(prepared.suite.rows)}
    for variant in VARIANTS:
        masks[variant.label] = make_masks(prepared, pipeline, variant, forecast=True)
        likelihoods[variant.label] = pipeline.likelihood(prepared.suite.rows, variant.key)
        pipeline.release(variant.key)
    return Outcome(stored_moments(prepared), masks, likelihoods)


def stored_moments(prepared: Prepared) -> dict[str, tuple[int, bytes]]:
    by_matrix = {}
    for name, calibration in prepared.sets.items():
        for layer in range(4):
            moments = prepared.moment_store().load(calibration.key, layer)
            assert moments is not None
            for matrix, seen in moments.items():
                by_matrix[f"{name} {layer}.{matrix}"] = seen.tokens, seen.sumsq_I.numpy().tobytes()
    return by_matrix


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    prepared = ready(tmp_path_factory.mktemp("whole"))
    with opened(prepared) as pipeline:
        yield outcome(prepared, pipeline)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("shards", "over_ray"), FORMS)
def test_local_and_ray_pipelines_give_bit_identical_results(
    shards: int, over_ray: bool, expected: Outcome, tmp_path: Path
) -> None:
    prepared = ready(tmp_path, shards=shards)
    with opened(prepared, over_ray) as pipeline:
        result = outcome(prepared, pipeline)
    assert result.moments == expected.moments
    assert result.masks == expected.masks
    assert result.likelihoods == expected.likelihoods


def test_variants_differ(expected: Outcome) -> None:
    assert len({pruned.digest for pruned in expected.masks.values()}) == len(VARIANTS)
    assert len({tuple(values) for values in expected.likelihoods.values()}) == len(VARIANTS) + 1


@pytest.mark.parametrize("family", ["bloom", "gpt2", "mixtral", "gemma3_text", "opt"])
def test_results_of_other_families_do_not_depend_on_shards(family: str, tmp_path: Path) -> None:
    outcomes = []
    for shards in (1, 3):
        prepared = ready(tmp_path / str(shards), source(family), shards)
        with opened(prepared) as pipeline:
            outcomes.append(outcome(prepared, pipeline))
    assert outcomes[0] == outcomes[1]


def test_model_with_few_positions_is_scored(tmp_path: Path) -> None:
    """Logits are made for 512 tokens at a time, which such a model has no positions for."""
    likelihoods = []
    for positions in (400, 2048):
        model = save(config("opt", max_position_embeddings=2048), tmp_path / f"model-{positions}")
        text = (model.folder / "config.json").read_text().replace("2048", str(positions))
        if positions == 400:
            shorten(model.folder, positions)
        (model.folder / "config.json").write_text(text)
        only_english = {"perplexity": {"languages": ["en"], "lines": 20}}
        prepared = ready(tmp_path / str(positions), model, evaluation=only_english)
        assert sum(batch.tokens for batch in prepared.suite.rows.batches) > 2 * 400
        with opened(prepared) as pipeline:
            likelihoods.append(pipeline.likelihood(prepared.suite.rows))
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-6)


def shorten(folder: Path, positions: int) -> None:
    """Cut OPT's table of learned positions, which has two rows more than there are positions."""
    file, key = folder / "model.safetensors", "model.decoder.embed_positions.weight"
    weights = load_file(file)
    weights[key] = weights[key][: positions + 2].clone()
    save_file(weights, file, {"format": "pt"})


def test_results_do_not_depend_on_the_thread_count(expected: Outcome, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        prepared = ready(tmp_path)
        with opened(prepared) as pipeline:
            assert outcome(prepared, pipeline) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", [SEQUENTIAL, MIXED_SEQUENTIAL], ids=str)
def test_sequential_pruning_may_stop_after_any_layer(
    variant: Variant, expected: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlprune.shards.pipeline.SEQUENTIAL_LAYERS", 1)
    prepared = ready(tmp_path)
    steps: list[tuple[int, int]] = []
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])  # for forecasts
        for _ in range(2):  # the second run must not depend on the first
            made = make_masks(prepared, pipeline, variant, lambda *done: steps.append(done), forecast=True)
            assert made == expected.masks[variant.label]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2


def test_another_number_of_shards_reads_stored_moments(expected: Outcome, tmp_path: Path) -> None:
    first = ready(tmp_path, shards=2)
    with opened(first) as pipeline:
        gather_moments(first, pipeline, VARIANTS)
    second = ready(tmp_path, shards=3)
    with opened(second) as pipeline:
        assert all(pipeline.restore(made.key) == (True, ()) for made in second.sets.values())
        assert make_masks(second, pipeline, WANDA, forecast=True) == expected.masks[WANDA.label]


def test_moments_of_a_corrupt_file_are_gathered_again_with_a_warning(
    expected: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = ready(tmp_path)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
    file = tmp_path / prepared.moment_store().name(prepared.set_of(str(WANDA.calibration)).key, 2)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        assert make_masks(prepared, pipeline, WANDA, forecast=True) == expected.masks[WANDA.label]
    assert any(file.name in record.message for record in caplog.records if record.levelname == "WARNING")
    with opened(prepared) as pipeline:
        assert pipeline.restore(prepared.set_of(str(WANDA.calibration)).key) == (True, ())


def test_texts_that_are_the_same_after_truncation_pass_the_model_once(tmp_path: Path) -> None:
    short = {"samples": 4, "shots": 1, "max_tokens": 8, "seed": 0}  # less than the English line
    prepared = ready(tmp_path, calibration=short, evaluation={"perplexity": {"languages": ["en"], "lines": 2}})
    assert prepared.set_of("mono:en").key == prepared.set_of("translation:en-fr").key
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])  # and the text of its forecast
        make_masks(prepared, pipeline, WANDA, forecast=True)
    moments = prepared.moment_store().load(prepared.set_of("mono:en").key, 0)
    assert moments is not None
    assert {seen.tokens for seen in moments.values()} == {4 * 8}


def test_an_incomplete_pass_is_not_used(expected: Outcome, tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    calibration = prepared.set_of(str(WANDA.calibration))
    with opened(prepared) as pipeline:
        pipeline.call_with_hidden(0, ShardWorker.forward, None, calibration.batches[:1], gather=[calibration.key])
        assert pipeline.restore(calibration.key) == (False, ())
        gather_moments(prepared, pipeline, [WANDA])
        assert make_masks(prepared, pipeline, WANDA, forecast=True) == expected.masks[WANDA.label]


# invariant 2: every weight moves once


def test_a_chunk_borrows_each_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    borrowed: list[int] = []
    borrow = Resident.borrow

    def counting(self: Resident, index: int, prefetch: int | None = None) -> Any:
        borrowed.append(index)
        return borrow(self, index, prefetch)

    monkeypatch.setattr(Resident, "borrow", counting)
    prepared = ready(tmp_path)
    calibration = prepared.set_of("translation:en-fr")
    with opened(prepared) as pipeline:
        pipeline.call_with_hidden(0, ShardWorker.forward, None, calibration.batches)
        assert borrowed == [0, 1, 2, 3], "all micro-batches pass a layer before the next is borrowed"
        borrowed.clear()
        make_masks(prepared, pipeline, SEQUENTIAL)
        assert borrowed == [0, 1, 2, 3], "to gather, to mask and masked: once for all three"


class DryPipeline(Pipeline):
    """Three shards that compute nothing: it records which methods are called, and in which order."""

    def __init__(self) -> None:
        super().__init__([Span(n, n + 1, 3) for n in range(3)], Chunks(2**20, few=False))
        self.events: list[tuple[str, int]] = []

    def call(self, shard: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def call_with_hidden(
        self, shard: int, method: Callable[..., Any], hidden: Any, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        self.events.append((method.__name__, shard))
        return Future(args[0])

    def get(self, future: Future[Any]) -> Any:
        self.events.append(("get", -1))
        return [[torch.zeros(1) for _ in cast(list[Batch], future.first)]]

    def close(self) -> None:
        pass


def batches(count: int) -> list[Batch]:
    return [Batch(torch.zeros(1, 8, dtype=torch.long), (8,), (n,)) for n in range(count)]


def test_all_shards_work_on_chunks_at_the_same_time() -> None:
    pipeline = DryPipeline()
    steps: list[tuple[int, int]] = []
    rows = RowSet(24, tuple(batches(24)), "")
    pipeline.likelihood(rows, progress=lambda done, total: steps.append((done, total)))
    calls_before_first_get = pipeline.events[: pipeline.events.index(("get", -1))]
    assert calls_before_first_get == [("forward", 0), ("forward", 1), ("likelihood", 2)] * 6
    assert steps == [(done, 24) for done in range(2, 25, 2)]
    waiting = 0
    for event, shard in pipeline.events:
        waiting += (event == "likelihood") - (event == "get")
        assert waiting <= 2 * 3, shard


def test_chunks_are_bounded_and_hold_every_batch() -> None:
    made = list(Chunks(2**20, few=False).split(batches(23), 3, masked=False))
    assert [row for chunk in made for batch in chunk for row in batch.rows] == list(range(23))
    assert len(made) >= DENSE_CHUNKS * 3
    only_one = list(Chunks(2**20, few=True).split(batches(23), 3, masked=True))
    assert len(only_one) == 1
    for few in (False, True):  # two micro-batches of 8 tokens are all that a chunk may hold
        assert [len(chunk) for chunk in Chunks(16, few).split(batches(5), 1, masked=True)] == [2, 2, 1]


# what a worker holds


def test_logits_are_computed_for_few_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    logits = ReplayModel.logits

    def counting(self: ReplayModel, hidden_BTH: Tensor) -> Tensor:
        made.append(hidden_BTH.shape[0] * hidden_BTH.shape[1])
        return logits(self, hidden_BTH)

    monkeypatch.setattr(ReplayModel, "logits", counting)
    prepared = ready(tmp_path)
    with opened(prepared) as pipeline:
        pipeline.likelihood(prepared.suite.rows)
    tokens = [sum(length - 1 for length in batch.lengths) for batch in prepared.suite.rows.batches]
    assert max(tokens) > LOGIT_TOKENS >= max(made), "each micro-batch at once, or none that is large"
    assert sum(made) == sum(tokens), "no pad, and no token twice"


def test_a_trial_leaves_no_mask_behind(tmp_path: Path) -> None:
    prepared, seen = ready(tmp_path), list[int]()
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [WANDA])
        worker: ShardWorker = pipeline._workers[0]  # type: ignore[attr-defined]
        for variant in (WANDA, SEQUENTIAL):
            run_trial(prepared, pipeline, variant, prepared.suite, lambda _: seen.append(len(worker._masks)))
            assert (worker._masks, worker._summaries) == ({}, {})
    assert seen == [1, 1]


# invariant 3: padding is ignored


def test_padding_content_does_not_change_results(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    calibration, suite = prepared.set_of("translation:en-fr"), prepared.suite
    assert any(batch.tokens < batch.input_ids.numel() for batch in calibration.batches), "nothing is padded"

    def results(worker: ShardWorker, pad: int) -> tuple[Any, Any]:
        padded = [_with_pads(batch, pad) for batch in calibration.batches]
        worker.forward(None, padded, gather=[str(pad)] * len(padded))
        nll = worker.likelihood(None, [_with_pads(batch, pad) for batch in suite.rows.batches])
        moments = worker._gathering["", str(pad)]
        return [m.sumsq_I for layer in moments.values() for m in layer.values()], nll

    with opened(prepared) as pipeline:
        worker: ShardWorker = pipeline._workers[0]  # type: ignore[attr-defined]
        (one, one_nll), (other, other_nll) = results(worker, 2), results(worker, 57)
        tokens = {m.tokens for layer in worker._gathering["", "2"].values() for m in layer.values()}
    assert all(torch.equal(a, b) for a, b in zip(one + one_nll, other + other_nll, strict=True))
    assert tokens == {calibration.tokens}


def _with_pads(batch: Batch, pad: int) -> Batch:
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, pad)
    return Batch(ids, batch.lengths, batch.rows)
