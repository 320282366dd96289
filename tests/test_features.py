"""Features of hidden states and shared masks: the workers' sums against plain ones, and the arithmetic on them."""

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlprune.analysis.feature_pictures import draw_mask_pairs, draw_masks, draw_overlap, draw_top
from mlprune.analysis.features import (
    ENDS,
    by_chance,
    features_csv,
    is_at,
    masks_csv,
    mean_overlaps,
    overlap_csv,
    overlaps,
    shares,
    top_channels,
    top_csv,
    total,
)
from mlprune.data.batches import Batch
from mlprune.data.calibration import CalibrationSet
from mlprune.models.residency import Ranks
from mlprune.pruning.masks import PackedMask
from mlprune.shards.features import both_drop, kind_of, prompt_norms
from mlprune.shards.pipeline import LocalPipeline, Pipeline
from mlprune.shards.worker import ShardWorker
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.session import worker_setup
from tests.tiny_models import source
from tests.work import WANDA, opened, ready

SETS = ("translation:en-fr", "mono:hi")
LAYERS = {
    **dict.fromkeys(("llama", "mixtral", "xglm"), "model.layers"),
    **dict.fromkeys(("gpt2", "bloom"), "transformer.h"),
}


def features(prepared: Prepared, pipeline: Pipeline) -> list[Tensor]:
    return pipeline.gather_features([prepared.set_of(name) for name in SETS], prepared.model_size.hidden)


def plain_features(folder: Path, family: str, made: CalibrationSet) -> Tensor:
    """By transformers alone: every prompt by itself, so there is no pad; [1 + layers, H] summed over prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    left: dict[int, Tensor] = {}
    for index, layer in enumerate(model.get_submodule(LAYERS[family])):
        layer.register_forward_hook(lambda _m, _i, out, n=index: left.update({n: _first(out)}))
    sums = torch.zeros(5, 32, dtype=torch.float64)
    for prompt in made.prompts:
        with torch.inference_mode():
            hidden_states = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        assert all(torch.equal(left[n], hidden_states[n + 1]) for n in range(3)), (
            "of the last, hidden_states has its norm"
        )
        states = [hidden_states[0], *(left[n] for n in range(4))]
        sums += torch.stack([state[0].double().square().sum(0).sqrt() for state in states])
    return sums


def _first(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


# the workers' sums


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom", "xglm"])
def test_magnitudes_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    prepared = ready(tmp_path, source(family))
    batches = prepared.set_of(SETS[0]).batches
    if family != "mixtral":
        assert any(batch.tokens < batch.input_ids.numel() for batch in batches), "nothing is padded"
    with opened(prepared) as pipeline:
        found = features(prepared, pipeline)
    for name, sums in zip(SETS, found, strict=True):
        expected = plain_features(prepared.source.folder, family, prepared.set_of(name))
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
def test_results_do_not_depend_on_shards(tmp_path: Path) -> None:
    found = []
    for shards, over_ray in ((1, False), (2, False), (2, True)):
        prepared = ready(tmp_path, shards=shards)
        with opened(prepared, over_ray) as pipeline:
            first, again = features(prepared, pipeline), features(prepared, pipeline)
            assert all(map(torch.equal, first, again)), "nothing of an earlier pass is left"
            drops = pipeline.shared_drops([prepared.recipe(WANDA)] * 2)
        counts = [{kind: both.tolist() for kind, both in layer.counts.items()} for layer in drops]
        found.append((first, counts))
    for sums, counts in found[1:]:
        assert all(map(torch.equal, sums, found[0][0]))
        assert counts == found[0][1]


def test_padding_content_does_not_change_results(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    batches = prepared.set_of(SETS[0]).batches

    def measured(worker: ShardWorker, pad: int) -> Tensor:
        padded = [
            Batch(torch.where(b.attention_mask.bool(), b.input_ids, pad), b.lengths, b.rows) for b in batches
        ]
        worker.start_features(["k"], 32)
        worker.forward(None, padded, gather=["k"] * len(padded))
        return worker.take_features()["k"]

    with opened(prepared) as pipeline:
        worker: ShardWorker = pipeline._workers[0]  # type: ignore[attr-defined]
        assert torch.equal(measured(worker, 2), measured(worker, 57))


def test_ranks_share_the_sums(tmp_path: Path) -> None:
    """Of three ranks and two micro-batches one has nothing to do."""
    prepared = ready(tmp_path)
    batches = prepared.set_of(SETS[0]).batches[:2]
    sums = []
    for ranks in [Ranks(), *(Ranks(rank, 3) for rank in range(3))]:
        worker = ShardWorker(worker_setup(prepared), prepared.spans[0], ranks)
        worker.start_features(["k"], 32)
        worker.forward(None, batches, gather=["k"] * 2)
        sums.append(worker.take_features()["k"])
    assert not sums[3].any()
    torch.testing.assert_close(sum(sums[1:]), sums[0], rtol=1e-14, atol=0)


def test_nan_in_padding_is_ignored() -> None:
    state_BTH = torch.randn(3, 5, 4)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = sum(state[mask.bool()].double().norm(dim=0) for state, mask in zip(state_BTH, mask_BT, strict=True))
    state_BTH[mask_BT == 0] = math.nan
    torch.testing.assert_close(prompt_norms(state_BTH, mask_BT), expected)


@contextmanager
def gathered(storage: Path, family: str, recipes: int) -> Iterator[tuple[Prepared, LocalPipeline, list[Any]]]:
    prepared = ready(storage, source(family))
    variants = [
        parse_variant(name, "wanda", sparsity, "unstructured", "dense")
        for name, sparsity in (*((name, 0.5) for name in SETS), (SETS[0], 0.3))
    ]
    with opened(prepared) as pipeline:
        assert isinstance(pipeline, LocalPipeline)
        gather_moments(prepared, pipeline, variants)
        yield prepared, pipeline, variants[:recipes]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_shared_drops_equal_those_of_unpacked_masks(family: str, tmp_path: Path) -> None:
    with gathered(tmp_path, family, 3) as (prepared, pipeline, variants):
        (worker,) = pipeline._workers
        found = pipeline.shared_drops([prepared.recipe(variant) for variant in variants])
        assert worker._masks == {}, "no mask is kept"
        for variant in variants:
            pipeline.prune(prepared.recipe(variant))
        masks = [worker._masks[variant.key] for variant in variants]
        for layer in range(4):
            expected: dict[str, list[list[int]]] = {}
            for name in masks[0][layer]:
                drops = [~mask[layer][name].unpack().numpy() for mask in masks]  # type: ignore[union-attr]
                both = [[int((one & other).sum()) for other in drops] for one in drops]
                kind = name.rstrip("0123456789").rstrip(".") if "experts" in name else name
                expected[kind] = (np.array(both) + expected.get(kind, 0)).tolist()
            assert {kind: both.tolist() for kind, both in found[layer].counts.items()} == expected
            assert 0 < expected[min(expected)][0][1] < expected[min(expected)][0][0], "neither alike nor apart"


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 13)])
def test_drops_in_common_by_hand(shape: tuple[int, int]) -> None:
    """Sizes that fill no whole byte: what pads the last one is no dropped weight."""
    kept = [torch.rand(shape) < share for share in (0.0, 0.3, 0.9, 1.1)]
    expected = [[int((~one & ~other).sum()) for other in kept] for one in kept]
    assert both_drop([PackedMask.pack(keep) for keep in kept]).tolist() == expected


def test_kinds_of_matrix() -> None:
    names = ("self_attn.q_proj", "fc1", "mlp.experts.gate_up_proj.13", "attn.c_proj")
    assert [kind_of(name) for name in names] == [*names[:2], "mlp.experts.gate_up_proj", names[3]]


# the arithmetic on them

# two conditions, two layers, five channels
MAGNITUDES = torch.tensor(
    [
        [[5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 0.0, 0.0, 0.0]],
        [[1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 0.0, 8.0, 0.0, 0.0]],
    ],
    dtype=torch.float64,
)


def test_overlap_by_hand() -> None:
    """Top 2 and bottom 2 of layer 0: {0 1} {3 4} and {4 3} {1 0}; of layer 1: {0 1} {3 4} and {0 2} {3 4}."""
    bottom, top = overlaps(MAGNITUDES, 0.4, "bottom"), overlaps(MAGNITUDES, 0.4, "top")
    assert bottom.tolist() == [[[0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]
    assert top.tolist() == [[[1.0, 1.0], [0.0, 0.5]], [[0.0, 0.5], [1.0, 1.0]]]


def test_overlap_has_a_direction() -> None:
    """The first's top channel is the second's bottom one; the second's top one is not the first's bottom one."""
    magnitudes = torch.tensor([[[4.0, 1.0, 3.0, 2.0]], [[1.0, 2.0, 4.0, 3.0]]], dtype=torch.float64)
    assert overlaps(magnitudes, 0.25, "bottom")[..., 0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(("width", "ratio", "count"), [(100, 0.29, 29), (576, 0.3, 172), (10, 0.5, 5)])
def test_the_requested_ratio_is_taken(width: int, ratio: float, count: int) -> None:
    magnitude = torch.rand(3, width, dtype=torch.float64)
    top, bottom = is_at(magnitude, ratio, "top"), is_at(magnitude, ratio, "bottom")
    assert (top.sum(1).tolist(), bottom.sum(1).tolist()) == ([count] * 3, [count] * 3)
    for row in range(3):
        rest = magnitude[row][~top[row] & ~bottom[row]].tolist()
        assert magnitude[row][top[row]].min() > max(rest, default=magnitude[row][bottom[row]].max())
        assert magnitude[row][bottom[row]].max() < min(rest, default=magnitude[row][top[row]].min())


def test_of_equal_channels_the_lower_is_higher() -> None:
    equal = torch.ones(1, 1, 7, dtype=torch.float64)
    assert is_at(equal, 0.3, "top").nonzero()[:, 2].tolist() == [0, 1]
    assert is_at(equal, 0.3, "bottom").nonzero()[:, 2].tolist() == [5, 6]
    assert not overlaps(equal, 0.5, "bottom").any()


def test_the_mean_overlap_leaves_out_the_embedding() -> None:
    magnitudes = torch.rand(2, 4, 10, dtype=torch.float64)
    expected = sum(overlaps(magnitudes, 0.3, "bottom")[..., n] for n in (1, 2, 3)) / 3
    torch.testing.assert_close(mean_overlaps(magnitudes, 0.3, "bottom"), expected)


def test_top_channels_are_those_of_either() -> None:
    mono, translation = torch.arange(40.0), torch.zeros(40)
    translation[3], translation[7] = 100, 39
    assert top_channels([mono, translation])[:4] == [3, 7, 39, 38]
    third = torch.zeros(40)
    third[5] = 50
    assert top_channels([mono, translation, third])[:4] == [3, 5, 7, 39]
    assert len(top_channels([mono, translation])) == 20


def test_share_of_dropped_weights() -> None:
    """{0 1 2 3}, {2 3 4 5 6} and nothing: two of seven."""
    both = torch.tensor([[4, 2, 0], [2, 5, 0], [0, 0, 0]])
    assert shares(both).tolist() == [[1, 2 / 7, 0], [2 / 7, 1, 0], [0, 0, 1]]
    layers = [{"a": both, "b": both}, {"a": both}]
    assert total(layers).tolist() == (3 * both).tolist()


def test_share_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(10**6, generator=generator) < 0.3 for _ in range(2))
    assert by_chance(0.3) == pytest.approx(float((one & other).sum() / (one | other).sum()), abs=2e-3)


# tables and pictures


def rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_tables_hold_the_same_numbers() -> None:
    conditions, magnitudes = ("mono:en", "mono:fr", "translation:en-fr"), torch.rand(3, 2, 9, dtype=torch.float64)
    for row in (table := rows(features_csv(conditions, magnitudes))):
        place = conditions.index(row["condition"]), int(row["layer"]), int(row["channel"])
        assert float(row["magnitude"]) == float(magnitudes[place])
    assert len(table) == 3 * 2 * 9
    for row in (table := rows(overlap_csv(conditions, magnitudes, 0.3))):
        end: Any = row["other_end"]
        place = conditions.index(row["condition"]), conditions.index(row["other"]), int(row["layer"])
        assert float(row["overlap"]) == float(overlaps(magnitudes, 0.3, end)[place])
    assert len(table) == 2 * 3 * 3 * 2
    both = torch.tensor([[4, 2, 1], [2, 5, 3], [1, 3, 6]])
    table = rows(masks_csv(conditions, [{"q": both}, {"q": 2 * both, "k": both}]))
    assert len(table) == 3 * 3
    last = {"condition": "mono:fr", "other": "translation:en-fr", "layer": "2", "matrix": "k"}
    assert table[-1] == last | {"both": "3", "either": "8", "share": "0.375"}
    compared = {"fr": {"mono:x": magnitudes[1, 0], "translation:en-x": magnitudes[2, 0]}}
    table = rows(top_csv(compared, 0))
    assert [int(row["channel"]) for row in table] == top_channels(compared["fr"].values())
    for row in table:
        assert float(row["translation:en-x"]) == float(magnitudes[2, 0][int(row["channel"])])


@pytest.mark.parametrize("languages", [("fr",), ("fr", "es", "zh", "hi", "swh", "deu", "it", "ru", "ja")])
def test_pictures_are_drawn(languages: tuple[str, ...]) -> None:
    """Any number of languages, a kind of matrix that some layers lack, a channel that dwarfs the others."""
    forms = ("mono:x", "translation:en-x", "translation:x-en")
    conditions = [form.replace("x", code) for form in forms for code in languages]
    count = len(conditions)
    magnitudes = torch.rand(count, 3, 30, dtype=torch.float64)
    magnitudes[:, :, 4] *= 1000
    places = {code: range(n, count, len(languages)) for n, code in enumerate(languages)}
    compared = {
        code: {form: magnitudes[index, 1] for form, index in zip(forms, indices, strict=True)}
        for code, indices in places.items()
    }
    both = torch.full((count, count), 3) + torch.eye(count, dtype=torch.int64)
    shared = [{"q": both, "k": both}, {"q": both}]
    bottom, top = (mean_overlaps(magnitudes, 0.3, end) for end in ENDS)
    drawn = [
        draw_top(compared, 1, "a$model$"),
        draw_overlap(conditions, bottom, top, 0.3, "a$model$"),
        draw_masks(places, forms, shared, 0.5, "a$model$"),
        draw_mask_pairs(conditions, shared, 0.5, "a$model$"),
    ]
    for picture in drawn:
        pixels = imread(io.BytesIO(picture), format="png")
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.01
