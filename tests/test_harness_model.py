"""Requests of lm-evaluation-harness, of a masked model in shards, against the harness's own `hf` model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mlprune.errors import ModelError
from mlprune.evaluation.harness.encoder import Encoder
from mlprune.evaluation.harness.requests import LikelihoodRequest, Requests, Row
from mlprune.models.source import ModelSource
from tests.harnessed import POSITIONS, HarnessModel, hf, masked, model, requests, silence, texts
from tests.tiny import tokenizer
from tests.tiny_models import source
from tests.work import RANDOM, opened, ready

__all__ = ["hf", "model"]  # fixtures


def pairs() -> list[tuple[str, str]]:
    continuations = [text[:25] + "?!" for text in texts(40, 1)]  # some token of it is not of the context
    contexts = [*texts(30, 2), *["", "<s>begun already", "ends in spaces   ", "<s>", "x"] * 2]
    # of one token each, after one context: `hf` takes them from one forward
    shared = [("The same context", end) for end in (" a", "b", "c", " d")]
    return [*zip(contexts, continuations, strict=True), *shared, ("", "<s>x"), ("x", "<s>")]


def beginning() -> PreTrainedTokenizerFast:
    """The tests' tokenizer, but that it begins every text with its first token, as Llama's does."""
    made = copy.deepcopy(tokenizer())
    made.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert made("a").input_ids[0] == 0
    return made


@pytest.mark.parametrize(("shards", "words"), [(1, tokenizer), (2, tokenizer), (1, beginning)])
def test_responses_equal_those_of_hf(shards: int, words: Any, hf: Any, model: ModelSource, tmp_path: Path) -> None:
    """Both look at the same masked weights; the numbers differ by the rounding of another batch at most."""
    documents = [(text,) for text in (*texts(8, 3), "<s>begun already")]
    until: Any = (["\n"], [" ", "e"], ["</s>"], ["the", "ना"], [], "a")
    prompts = [
        (text + "x", {"until": until[n % 6], "max_gen_toks": 5 + n % 3 * 10})
        for n, text in enumerate((*texts(16, 4), "<s>begun already"))
    ]
    asked: dict[str, Any] = {
        "loglikelihood": pairs(),
        "loglikelihood_rolling": documents,
        "generate_until": prompts,
    }
    with masked(tmp_path, model, shards) as pipeline:
        ours = HarnessModel(pipeline, RANDOM.key, words(), POSITIONS, False)
        mine = {kind: getattr(ours, kind)(requests(kind, given)) for kind, given in asked.items()}
    with silence():
        other = HFLM(hf.model, tokenizer=words(), batch_size=1, max_length=POSITIONS)
        theirs = {kind: getattr(other, kind)(requests(kind, given)) for kind, given in asked.items()}
    for told, expected in zip(mine["loglikelihood"], theirs["loglikelihood"], strict=True):
        assert told == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert mine["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], rel=1e-5)
    assert mine["generate_until"] == theirs["generate_until"]
    assert len(set(mine["generate_until"])) > 10, "the texts are not all alike"
    assert any(0 < len(text) < 8 for text in mine["generate_until"]), "some end before their time"


def test_greedy_is_what_the_model_would_write(model: ModelSource, tmp_path: Path) -> None:
    prompts = [tokenizer().encode(text + "x")[:100] for text in texts(6, 5)]
    with masked(tmp_path, model, shards=1) as pipeline:
        new = pipeline.generate(prompts, 3, lambda row, tokens: False, RANDOM.key)
        changed = [[*tokens[:2], (tokens[2] + 1) % 384] for tokens in new]
        rows = [(*prompt, *end) for ends in (new, changed) for prompt, end in zip(prompts, ends, strict=True)]
        asked = [LikelihoodRequest((Row(row, len(row) - 3),), False) for row in rows]
        told = Requests.build(asked, 0, False).responses(pipeline, RANDOM.key)
    assert [one[1] for one in told if isinstance(one, tuple)] == [True] * 6 + [False] * 6


def test_text_ends_where_the_checkpoint_says(model: ModelSource, hf: Any, tmp_path: Path) -> None:
    """At a token that only generation_config.json knows: a tokenizer knows one at most."""
    asked = requests("generate_until", [(text + "x", {"until": [], "max_gen_toks": 12}) for text in texts(12, 6)])
    here = copy.deepcopy(tokenizer())
    here.name_or_path = str(tmp_path)
    with masked(tmp_path, model, shards=1) as pipeline:
        prompts = [one.prompt for one in Encoder(here, POSITIONS).generate_until(asked)]
        new = pipeline.generate(prompts, 12, lambda row, tokens: False, RANDOM.key)
        common = max({ids[3] for ids in new}, key=[ids[3] for ids in new].count)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, common]}))
        mine = HarnessModel(pipeline, RANDOM.key, here, POSITIONS, False).generate_until(asked)
    expected = [ids[: ids.index(common) + 1] if common in ids else ids for ids in new]
    assert mine == [tokenizer().decode(ids, skip_special_tokens=True) for ids in expected]
    assert min(map(len, expected)) <= 4
    with silence():
        before, hf.model.generation_config.eos_token_id = hf.model.generation_config.eos_token_id, [1, common]
        theirs = hf.generate_until(asked)
        hf.model.generation_config.eos_token_id = before
    assert mine == theirs


def test_generation_ends_at_the_stop_string() -> None:
    (asked,) = Encoder(tokenizer(), 512).generate_until(requests("generate_until", [("x", {"until": ["\n\n"]})]))
    ids = tokenizer().encode("some\ntext\n\nand more")
    ends = [asked.has_ended(ids[:length]) for length in range(1, len(ids))]
    assert tokenizer().decode(ids[: ends.index(True) + 1]).rstrip("an") == "some\ntext\n\n"
    assert asked.has_ended([*ids[:2], 1]), "the end-of-sequence token"


def test_positions_are_those_of_hf(hf: Any, model: ModelSource) -> None:
    with silence():
        theirs = HFLM(hf.model, tokenizer=tokenizer(), batch_size=1)
    assert Encoder(tokenizer(), 512).max_length == theirs.max_length == 512
    unlimited = copy.deepcopy(tokenizer())
    assert Encoder(unlimited, None).max_length == 2048, "as `hf` has it for a model that does not say"
    unlimited.model_max_length = 300
    assert Encoder(unlimited, None).max_length == 300


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("loglikelihood", (" ", "x"), "spaces alone"),
        ("loglikelihood", ("x", "y" * 65), "likelihood of 65 tokens; the model can score 1 to 64"),
        ("generate_until", ("x", {"until": [], "do_sample": True, "temperature": 0.7}), "only greedy decoding"),
        ("generate_until", ("x", {"until": [], "temperature": 0.7}), "only greedy decoding"),
        ("generate_until", ("x", {"until": [], "num_beams": 4}), "num_beams"),
        ("generate_until", ("x", {"until": [], "max_gen_toks": 64}), "text of 64 tokens; the model takes 64"),
        ("generate_until", ("", {"until": []}), "no tokens"),
    ],
)
def test_unsupported_requests_are_refused(kind: str, arguments: tuple[Any, ...], words: str) -> None:
    positions = 512 if words == "no tokens" else POSITIONS
    with pytest.raises(ValueError, match=words):
        getattr(Encoder(tokenizer(), positions), kind)(requests(kind, [arguments]))


def test_a_tokenizer_without_a_token_to_begin_with() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ModelError, match="no begin- or end-of-sequence token"):
        Encoder(bare, POSITIONS)


@pytest.mark.parametrize("family", ["gpt2", "opt", "xglm", "bloom", "phi3", "gemma3_text"])
def test_a_document_longer_than_the_model_takes_is_read_in_windows(family: str, tmp_path: Path) -> None:
    """A window is one token longer than the positions, and its last token is told, not given."""
    prepared = ready(tmp_path, source(family), 2)
    asked = requests("loglikelihood_rolling", [("abcde " * 400,)])
    with opened(prepared) as pipeline:
        ours = HarnessModel(pipeline, None, tokenizer(), prepared.model_size.positions, False)
        mine = ours.loglikelihood_rolling(asked)
    with silence():
        whole = AutoModelForCausalLM.from_pretrained(source(family).folder).eval()
        theirs = HFLM(whole, tokenizer=tokenizer(), batch_size=1).loglikelihood_rolling(asked)
    assert mine == pytest.approx(theirs, rel=1e-5)
