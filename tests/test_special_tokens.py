"""The context token of the tokenizer classes of the supported families, each made on the spot."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    XGLMTokenizer,
)

from mlprune.data.special_tokens import begin_id, context_id
from mlprune.errors import ModelError
from tests.tiny import tokenizer

PIECES = [(piece, -float(n)) for n, piece in enumerate(("<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b"))]
LETTERS = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, "▁": 4, "a": 5, "▁a": 6}


def templated(template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, which adds special tokens (<s> is 0, </s> 1, <pad> 2) as `template` says."""
    changed = deepcopy(tokenizer())
    special = [("<s>", 0), ("</s>", 1), ("<pad>", 2)]
    changed.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=special)
    return changed


def xglm() -> Any:
    return XGLMTokenizer(vocab=PIECES)


def llama() -> Any:
    return LlamaTokenizer(vocab=LETTERS, merges=[("▁", "a")], add_bos_token=True)


def test_a_text_of_xglm_begins_with_its_end_of_sequence_token(tmp_path: Path) -> None:
    """Its tokenizer puts </s> first, as fairseq's language models are trained, although its bos is <s>."""
    assert xglm()("b").input_ids == [2, 5]
    assert (xglm().bos_token_id, xglm().eos_token_id) == (0, 2)
    assert context_id(xglm()) == 2
    xglm().save_pretrained(tmp_path)
    assert context_id(AutoTokenizer.from_pretrained(tmp_path)) == 2


BOS_FIRST: list[Callable[[], Any]] = [
    llama,
    partial(GemmaTokenizer, add_bos_token=True),
    lambda: templated("<s> $A"),
    lambda: templated("<s> $A </s>"),
]


@pytest.mark.parametrize("make", BOS_FIRST)
def test_a_first_special_token_that_is_bos_stays_the_context(make: Callable[[], Any]) -> None:
    words = make()
    assert words("a").input_ids[0] == words.bos_token_id
    assert context_id(words) == words.bos_token_id


NONE_FIRST: list[Callable[[], Any]] = [
    tokenizer,
    GPT2Tokenizer,  # of GPT-2, mGPT
    Qwen2Tokenizer,  # has no bos
    lambda: templated("$A </s>"),
    lambda: templated("<pad> </s> $A"),  # two tokens, as GLM's [gMASK] <sop>
]


@pytest.mark.parametrize("make", NONE_FIRST)
def test_otherwise_the_context_is_bos_else_eos(make: Callable[[], Any]) -> None:
    words = make()
    expected = words.eos_token_id if words.bos_token_id is None else words.bos_token_id
    assert context_id(words) == begin_id(words) == expected


@pytest.mark.parametrize("make", [xglm, llama, tokenizer, Qwen2Tokenizer])
def test_the_harness_keeps_its_own_rule(make: Callable[[], Any]) -> None:
    hf = HFLM.__new__(HFLM)
    hf.custom_prefix_token_id, hf.tokenizer = None, make()
    assert begin_id(make()) == hf.prefix_token_id


def test_a_tokenizer_without_either_token_is_refused_unless_it_puts_one_first() -> None:
    for template, context in (("$A", None), ("<pad> $A", 2)):
        words = templated(template)
        words.bos_token = words.eos_token = None
        if context is not None:
            assert context_id(words) == context
            continue
        with pytest.raises(ModelError, match="has no begin- or end-of-sequence token"):
            context_id(words)
