"""Masks and changed weights of whole models: SparseGPT, OWL, padding and code as calibration."""

import hashlib
import json
import sysconfig
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlprune.commands.prune import prune
from mlprune.errors import ModelError
from mlprune.pruning import sparsegpt
from mlprune.pruning.combinations import combine
from mlprune.pruning.masks import keep_mask
from mlprune.pruning.moments import Moments
from mlprune.pruning.ranks import best_rank
from mlprune.pruning.scores import SCORES, Score
from mlprune.spec.calibrations import Combination
from mlprune.spec.variants import Variant
from mlprune.sweep.grid import parse_variant
from mlprune.sweep.masks import gather_moments, make_masks
from mlprune.sweep.prepare import prepare
from tests.tiny_models import source
from tests.work import CONTRASTIVE, OWL, SPARSEGPT, masks_of, opened, ready


def pruned(folder: Path, variant: Variant, family: str = "llama", **changes: Any) -> Any:
    prepared = ready(folder, source(family), **changes)
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        made = make_masks(prepared, pipeline, variant)
        return made, masks_of(prepared, pipeline, variant), prepared


def test_a_singular_hessian_is_an_error_that_names_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "DAMPING", 0.0)
    few = {"samples": 1, "shots": 1, "max_tokens": 20, "seed": 0}  # 20 tokens cannot span 32 channels
    with pytest.raises(ModelError) as caught:
        pruned(tmp_path, SPARSEGPT, calibration=few)
    assert str(caught.value) == (
        "search.score: sparsegpt at layer 0, self_attn.q_proj: its Hessian is not positive definite; raise "
        "calibration.samples, or load it in float32"
    )


@pytest.mark.parametrize("variant", [CONTRASTIVE, SPARSEGPT], ids=str)
def test_sums_that_are_not_finite_are_an_error_that_names_their_layer(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Moments.of

    def overflowing(input_TI: torch.Tensor, gram: bool = False) -> Moments:
        seen = of(input_TI, gram)
        seen.sumsq_I[3] = torch.inf
        return seen

    monkeypatch.setattr(Moments, "of", overflowing)
    with pytest.raises(
        ModelError, match=r"model\.dtype: layer 0, self_attn\.q_proj: the sums of its inputs are not"
    ):
        pruned(tmp_path, variant)


def test_changed_weights_compensate_for_dropped_ones(tmp_path: Path) -> None:
    """On the calibration text, SparseGPT's model is closer to the dense one than Wanda's of the same sparsity."""
    wanda = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "sequential")
    dense = AutoModelForCausalLM.from_pretrained(source("llama").folder).eval()
    errors = {}
    for variant in (wanda, SPARSEGPT):
        made, weights, prepared = pruned(tmp_path / variant.score.name, variant)
        assert made.sparsity == pytest.approx(0.5, abs=0.001)
        other = AutoModelForCausalLM.from_pretrained(source("llama").folder).eval()
        other.load_state_dict(weights, strict=False)
        (made_set,) = prepared.sets_of(variant)
        with torch.no_grad():
            states = [
                [m.model(torch.tensor([p.ids])).last_hidden_state for m in (dense, other)]
                for p in made_set.prompts
            ]
        errors[variant.score.name] = sum(float((one - two).square().sum()) for one, two in states)
    assert errors["sparsegpt"] < 0.9 * errors["wanda"]


def test_owl_keeps_the_total_and_gives_each_layer_its_own_sparsity(tmp_path: Path) -> None:
    made, weights, _ = pruned(tmp_path, OWL)
    assert len(set(made.layers)) > 1
    assert max(made.layers) - min(made.layers) <= 2 * 0.08
    assert made.sparsity == 0.5
    dropped = [
        torch.cat([w.flatten() == 0 for name, w in weights.items() if f"layers.{n}." in name and "proj" in name])
        for n in range(len(made.layers))
    ]
    assert [float(layer.double().mean()) for layer in dropped] == pytest.approx(made.layers)


def test_padded_sums_of_the_paper_differ_and_have_their_own_key(tmp_path: Path) -> None:
    """With count_padding every prompt is as long as it may be, and its pads are tokens like any."""
    wanda = parse_variant("translation:en-fr", "wanda", 0.5, "unstructured", "dense")
    asked = {"samples": 6, "shots": 1, "max_tokens": 400, "seed": 0}
    digests = []
    for counted in (False, True):
        made, _, prepared = pruned(tmp_path / str(counted), wanda, calibration=asked | {"count_padding": counted})
        made_set = prepared.set_of(str(wanda.calibration))
        assert (made_set.tokens == 6 * 400) == counted
        digests.append(made.digest)
    assert digests[0] != digests[1]


def test_code_calibrates_and_is_named_in_the_manifest(tmp_path: Path) -> None:
    """Beside lines of text, in a mixture and as the side that is weighed against."""
    mixed = parse_variant("mix:code=0.5,mono:en=0.5", "wanda", 0.5, "unstructured", "dense")
    against = parse_variant(None, "contrastive:mono:en/code", 0.5, "unstructured", "sequential")
    plain = parse_variant("mono:en", "wanda", 0.5, "unstructured", "dense")
    spec = ready(tmp_path, calibration={"samples": 3, "shots": 2, "max_tokens": 60}).spec
    digests = set()
    for variant in (mixed, against, plain):
        prune(spec, variant, tmp_path / variant.key)
        manifest = json.loads((tmp_path / variant.key / "mlprune.json").read_text(encoding="utf-8"))
        digests.add(manifest["masks"]["digest"])
        kinds = [prompt["kind"] for prompt in manifest["prompts"]]
        assert kinds.count("code") == (0 if variant is plain else 3)
        for prompt in manifest["prompts"]:
            if prompt["kind"] == "code":
                text = (Path(sysconfig.get_path("stdlib")) / prompt["source"]).read_text(encoding="utf-8")
                assert prompt["sha256"] == hashlib.sha256(text.encode()).hexdigest()
                assert prompt["corpus"].startswith("stdlib 3.")
    assert len(digests) == 3


@pytest.mark.parametrize("score", ["wanda", "ria"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("combination", ["rank", "max", "power=3"])
def test_combined_texts_give_the_masks_of_their_stored_moments(
    combination: str, pattern: str, score: str, tmp_path: Path
) -> None:
    """Each text's moments are read from the store, combined by hand, and masked with the rule alone."""
    text = f"{combination}:mono:en=0.2,mono:fr=0.3,mono:hi=0.5"
    variant = parse_variant(text, score, 0.5, pattern, "dense")
    prepared = prepare(ready(tmp_path).spec, [variant])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [variant])
        make_masks(prepared, pipeline, variant)
        masked = masks_of(prepared, pipeline, variant)
    dense = AutoModelForCausalLM.from_pretrained(prepared.source.folder).state_dict()
    shares = {"en": Fraction(2, 10), "fr": Fraction(3, 10), "hi": Fraction(5, 10)}
    store = prepared.moment_store()
    for index in range(len(prepared.model_size.layers)):
        layers = {code: store.load(prepared.set_of(f"mono:{code}").key, index) for code in shares}
        for name in layers["en"] or ():
            full_name = f"model.layers.{index}.{name}.weight"
            texts = [(by_name[name], shares[code]) for code, by_name in layers.items() if by_name]
            expected = plain_mask(combination, dense[full_name], texts, SCORES[score], variant)
            assert torch.equal(masked[full_name], dense[full_name] * expected), full_name


def plain_mask(
    combination: str,
    weight_OI: torch.Tensor,
    texts: list[tuple[Moments, Fraction]],
    rule: object,
    variant: Variant,
) -> torch.Tensor:
    assert isinstance(rule, Score)
    assert len(texts) == 3
    if combination == "rank":
        scores = [(rule.function(weight_OI, [moments], 0), share) for moments, share in texts]
        score_OI = best_rank(scores, variant.pattern, rule.within)
    else:
        score_OI = rule.function(weight_OI, [combine(texts, Combination.parse(combination))], 0)
    return keep_mask(score_OI, variant.sparsity, variant.pattern, rule.within)


def test_outliers_of_ranked_texts_are_the_largest_of_any_text(tmp_path: Path) -> None:
    ranked = parse_variant("rank:mono:en,mono:hi", "wanda", 0.5, "unstructured", "dense", "owl")
    alone = [parse_variant(f"mono:{code}", "wanda", 0.5, "unstructured", "dense", "owl") for code in ("en", "hi")]
    prepared = prepare(ready(tmp_path).spec, [ranked, *alone])
    with opened(prepared) as pipeline:
        gather_moments(prepared, pipeline, [ranked, *alone])
        largest, *each = [pipeline.signals(prepared.recipe(variant)) for variant in (ranked, *alone)]
    assert list(largest) == [max(shares) for shares in zip(*each, strict=True)]
