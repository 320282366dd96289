"""Channels and heads: how many stay, which, the repair, and a checkpoint that is really smaller."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mlprune.commands.evaluate import evaluate_checkpoint
from mlprune.commands.prune import prune
from mlprune.errors import SpecError
from mlprune.models.structures import FEED_FORWARD, HEADS, find_units
from mlprune.pruning.moments import Moments
from mlprune.pruning.structured import DAMPING, energy, kept_units, magnitude, refit
from mlprune.spec.variants import Pattern, Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import Prepared
from mlprune.sweep.trial import trial_metrics
from tests.tiny_models import config, save, source
from tests.work import masks_of, opened, ready

PLAIN = parse_variant("mono:hi", "wanda", 0.25, "channels", "dense")
REPAIRED = parse_variant(
    "mix:mono:hi,translation:en-fr", "wanda", 0.25, "channels", "dense", repair="least-squares"
)
MAGNITUDE = parse_variant("mono:hi", "magnitude", 0.25, "channels", "dense", repair="least-squares")
LARGEST = parse_variant("max:mono:hi,mono:en", "wanda", 0.25, "channels/16", "sequential")
RANKED = parse_variant("rank:mono:hi,mono:en", "wanda", 0.25, "channels", "dense")
HEADLESS = parse_variant("mono:hi", "wanda", 0.5, "heads", "dense")
HEADLESS_REPAIRED = parse_variant("mono:hi", "wanda", 0.5, "heads", "dense", repair="least-squares")
RANDOM = parse_variant(None, "random", 0.5, "heads", "dense")
EVERY = (PLAIN, REPAIRED, MAGNITUDE, LARGEST, RANKED, HEADLESS, HEADLESS_REPAIRED, RANDOM)


# the arithmetic


@pytest.mark.parametrize(
    ("count", "sparsity", "multiple", "kept"),
    [
        (1536, 0.2, 64, 1216),  # 1228.8 is nearer to 19 * 64 than to 20 * 64
        (1536, 0.2, 1, 1229),
        (1536, 0.2, 128, 1280),  # 9.6 of 128
        (100, 0.29, 1, 71),  # read as a decimal: in binary, 29 of 100 would be 28.99...
        (64, 0.5, 64, 64),  # a tie goes upwards
        (64, 0.6, 64, 0),
        (3, 0.4, 1, 2),
        (1536, 0.0, 64, 1536),
    ],
)
def test_kept_units_are_a_multiple(count: int, sparsity: float, multiple: int, kept: int) -> None:
    assert kept_units(count, sparsity, multiple) == kept


def test_energy_by_hand() -> None:
    """Two tokens; column 0 has squares 1 and 9, column 1 has 4 and 4. As two channels, and as one head."""
    reader_OC = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    moments = Moments(2, torch.tensor([10.0, 8.0], dtype=torch.float64))
    assert magnitude(reader_OC, (), 2, 0).tolist() == [10.0, 4.0]
    assert energy(reader_OC, (moments,), 2, 0).tolist() == [10.0 * 5, 4.0 * 4]
    assert energy(reader_OC, (moments,), 1, 0).tolist() == [66.0]


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix [O, C], correlated inputs [T, C] and which channels stay."""
    draw = torch.Generator().manual_seed(seed)
    inputs_TC = torch.randn(90, 6, generator=draw, dtype=torch.float64) @ torch.randn(
        6, 24, generator=draw, dtype=torch.float64
    ) + 0.1 * torch.randn(90, 24, generator=draw, dtype=torch.float64)
    keep_C = torch.rand(24, generator=draw) > 0.3
    return torch.randn(5, 24, generator=draw, dtype=torch.float64), inputs_TC, keep_C


@pytest.mark.parametrize("seed", range(5))
def test_refit_is_the_least_squares_solution(seed: int) -> None:
    """Held to a plain solver of the stacked system, in which damping is further rows."""
    down_OC, inputs_TC, keep_C = problem(seed)
    gram_CC = inputs_TC.T @ inputs_TC
    damping = DAMPING * gram_CC[keep_C][:, keep_C].diagonal().mean()
    kept_TK, kept_OK = inputs_TC[:, keep_C], down_OC[:, keep_C]
    rows_KK = damping.sqrt() * torch.eye(int(keep_C.sum()), dtype=torch.float64)
    left, right = torch.cat([kept_TK, rows_KK]), torch.cat([inputs_TC @ down_OC.T, rows_KK @ kept_OK.T])
    expected_OK = torch.linalg.lstsq(left, right).solution.T
    refitted_OC = refit(down_OC, gram_CC, keep_C)
    assert refitted_OC.dtype == torch.float32
    torch.testing.assert_close(refitted_OC[:, keep_C], expected_OK.float())
    assert not refitted_OC[:, ~keep_C].any()
    assert torch.equal(refit(down_OC, gram_CC, torch.ones(24, dtype=torch.bool)), down_OC.float())


def test_refit_lowers_the_error() -> None:
    down_OC, inputs_TC, keep_C = problem(3)
    cut_OC = torch.where(keep_C, down_OC, 0.0)
    refitted_OC = refit(down_OC, inputs_TC.T @ inputs_TC, keep_C).double()
    wanted_TO = inputs_TC @ down_OC.T
    before, after = ((inputs_TC @ one.T - wanted_TO).square().sum() for one in (cut_OC, refitted_OC))
    assert after < before / 5, "the inputs have six directions, so the kept channels predict the removed ones"


# on models


def test_the_removed_channels_are_those_of_least_energy(tmp_path: Path) -> None:
    """Held to a whole model of transformers: hooks, and the formula."""
    prepared = ready(tmp_path, variants=[PLAIN])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [PLAIN])
        outcome = make_masks(prepared, pipeline, PLAIN)
        weights = masks_of(prepared, pipeline, PLAIN)
    model: Any = AutoModelForCausalLM.from_pretrained(source().folder)
    for index, layer in enumerate(model.model.layers):
        squares_C, down = torch.zeros(48, dtype=torch.float64), layer.mlp.down_proj

        def see(_: object, args: tuple[Tensor], sums: Tensor = squares_C) -> None:
            sums += args[0][0].double().square().sum(0)

        handle = down.register_forward_pre_hook(see)
        for prompt in prepared.set_of("mono:hi").prompts:
            model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
        handle.remove()
        score_C = squares_C * down.weight.double().square().sum(0)
        removed = set(score_C.argsort()[:12].tolist())
        name = f"model.layers.{index}.mlp"
        for rows in ("gate_proj", "up_proj"):
            zero_C = (weights[f"{name}.{rows}.weight"] == 0).all(1)
            assert set(zero_C.nonzero()[:, 0].tolist()) == removed
        assert set((weights[f"{name}.down_proj.weight"] == 0).all(0).nonzero()[:, 0].tolist()) == removed
    assert outcome.sparsity == Fraction(1, 4), "of the weights of the feed-forward networks"


def parameters(folder: Path) -> int:
    return sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(folder).parameters())


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, id=f"{family} {variant.label}")
        for families, variants in ((FEED_FORWARD, (PLAIN, REPAIRED)), (HEADS, (HEADLESS, HEADLESS_REPAIRED)))
        for family in sorted(families)
        for variant in variants
    ],
)
def test_the_smaller_checkpoint_has_the_metrics_of_the_variant(
    family: str, variant: Variant, tmp_path: Path
) -> None:
    prepared = ready(tmp_path / "a", source(family), variants=[variant])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        make_masks(prepared, pipeline, variant)
        before = trial_metrics(prepared.suite.run(pipeline, variant.key))
    pruned = prune(prepared.spec, variant, tmp_path / "out")
    sizes = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    if variant.pattern.structure == "channels":
        (key,) = FEED_FORWARD[family].sizes
        assert getattr(sizes, key) == 36, "of 48"
    else:
        groups = prepared.source.config().num_key_value_heads // 2
        assert (sizes.num_key_value_heads, sizes.num_attention_heads, sizes.head_dim) == (groups, 2, 8)
    assert pruned.size.parameters == parameters(tmp_path / "out") < pruned.dense.parameters
    assert pruned.dense.parameters == parameters(source(family).folder)
    model = prepared.spec.model.model_copy(update={"path": str(tmp_path / "out")})
    after = evaluate_checkpoint(prepared.spec.model_copy(update={"model": model}))
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-5), name


def made(prepared: Prepared, variant: Variant, over_ray: bool = False) -> tuple[str, dict[str, float]]:
    with opened(prepared, over_ray) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        outcome = make_masks(prepared, pipeline, variant, forecast=True)
        return outcome.digest, trial_metrics(prepared.suite.run(pipeline, variant.key)) | dict(outcome.forecast)


@pytest.mark.parametrize("variant", EVERY, ids=str)
def test_any_number_of_shards_gives_the_same_bits(variant: Variant, tmp_path: Path) -> None:
    one, two, three = (
        made(ready(tmp_path / str(shards), shards=shards, variants=[variant]), variant) for shards in (1, 2, 3)
    )
    assert one == two == three


def test_the_repair_lowers_the_loss_of_its_text(tmp_path: Path) -> None:
    """On the calibration text's own language, the repaired model is nearer to the dense one."""
    plain = parse_variant("mono:hi", "wanda", 0.25, "channels", "sequential")
    repaired = parse_variant("mono:hi", "wanda", 0.25, "channels", "sequential", repair="least-squares")
    prepared = ready(tmp_path, variants=[plain, repaired])
    with opened(prepared) as pipeline:
        losses = {}
        for variant in (plain, repaired):
            make_masks(prepared, pipeline, variant)
            losses[variant] = trial_metrics(prepared.suite.run(pipeline, variant.key))["bits_per_byte.hi"]
        whole = trial_metrics(prepared.suite.run(pipeline, None))["bits_per_byte.hi"]
    assert abs(losses[repaired] - whole) < abs(losses[plain] - whole)


def test_what_is_left_out_of_the_canonical_form() -> None:
    assert parse_variant("mono:en", "wanda", 0.5, "2:4", "dense", repair="least-squares").repair == "none"
    assert parse_variant("mono:en", "magnitude", 0.2, "channels", "sequential").calibration is None
    assert MAGNITUDE.calibration is not None, "the repair reads it"
    assert REPAIRED.propagation == "sequential"
    for variant in EVERY:
        assert Variant.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant
    assert str(Pattern.parse("channels/128")) == "channels/128"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"pattern": "channels/0"}, "pattern: 'channels/0': write unstructured, n:m"),
        ({"score": "ria"}, "score: 'ria': channels and heads are ranked by random, magnitude, wanda; "),
        ({"allocation": "owl"}, "search.allocation: 'owl': every layer loses the same number of units; "),
        ({"calibration": "max:mono:en,mono:fr"}, "search.calibration: 'max:mono:en,mono:fr': least-squares reads"),
        (
            {"calibration": None, "score": "magnitude"},
            "search.repair: 'least-squares': it needs calibration text; ",
        ),
    ],
)
def test_what_has_no_meaning_for_units_is_refused(values: dict[str, Any], line: str) -> None:
    plain = {"calibration": "mono:en", "score": "wanda", "pattern": "channels", "propagation": "dense"}
    with pytest.raises(SpecError) as caught:
        parse_variant(**{"sparsity": 0.2, "repair": "least-squares", **plain, **values})
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("family", "pattern", "sparsity", "line"),
    [
        ("bloom", "channels", 0.2, "search.pattern: 'channels': those of bloom have no size in config.json; "),
        ("mixtral", "channels", 0.2, "search.pattern: 'channels': those of mixtral have no size in config.json"),
        ("olmo2", "heads", 0.5, "search.pattern: 'heads': those of olmo2 have no size in config.json; "),
        ("llama", "channels/64", 0.2, "search.pattern: 'channels/64': a layer of the model has 48 channels"),
        ("llama", "channels/32", 0.8, "search.sparsity: 0.8: leaves none of the 48 channels of a layer, in steps"),
        ("llama", "heads", 0.8, "search.sparsity: 0.8: leaves none of the 2 heads of a layer, in steps of 1; "),
        ("llama", "channels", 0.001, "search.sparsity: 0.001: removes none of the 48 channels of a layer, in "),
    ],
)
def test_what_a_model_cannot_lose_is_refused(
    family: str, pattern: str, sparsity: float, line: str, tmp_path: Path
) -> None:
    variant = parse_variant("mono:en", "wanda", sparsity, pattern, "dense")
    with pytest.raises(SpecError) as caught:
        ready(tmp_path, source(family), variants=[variant])
    assert str(caught.value).startswith(line)


def test_sizes_that_transformers_refuses_are_answered(tmp_path: Path) -> None:
    four = save(config("llama", num_attention_heads=4, num_key_value_heads=4), tmp_path / "model")
    with pytest.raises(SpecError) as caught:
        ready(tmp_path, four, variants=[parse_variant(None, "magnitude", 0.25, "heads", "dense")])
    line = str(caught.value)
    assert line.startswith("search.sparsity: 0.25: transformers refuses a model with head_dim=8, ")
    assert "num_attention_heads=3, num_key_value_heads=3: " in line


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_rows_and_columns_of_a_head(family: str) -> None:
    """Of a group: queries of two heads, one key head and one value head."""
    units = find_units(source(family).config(), "heads")
    keep_U = torch.tensor([True, False])
    assert units.kept_columns(keep_U).tolist() == [True] * 16 + [False] * 16
    kept = [name for name in units.before for one in units.rows(name, keep_U).tolist() if one]
    assert len(kept) == 16 + 8 + 8
    if family == "phi3":
        rows = units.rows("self_attn.qkv_proj", keep_U)
        assert rows.nonzero()[:, 0].tolist() == [*range(16), *range(32, 40), *range(48, 56)]
