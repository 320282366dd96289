"""The special tokens that prompts and token rows need, with the fallbacks for tokenizers that lack one.

Text is tokenised elsewhere.
"""

from typing import TYPE_CHECKING

from mlprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "a"  # any text of one token or more


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return an id of the vocabulary to pad with. Where padding is ignored, every id will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def context_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token to put before a text, so that the text's first token has a likelihood too.

    It is the token that the tokenizer itself puts before a text, as the model was trained: for most models the
    beginning-of-sequence token, for XGLM (Lin et al. 2022, arXiv 2112.10668) the end-of-sequence token. Where the
    tokenizer puts none or several there, it is `begin_id`, whose errors it raises.
    """
    plain = tokenizer(_TEXT, add_special_tokens=False).input_ids
    complete = tokenizer(_TEXT).input_ids
    alone = len(complete) > len(plain) and complete[1 : len(plain) + 1] == plain
    return int(complete[0]) if alone else begin_id(tokenizer)


def begin_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the beginning-of-sequence token, else the end-of-sequence token.

    lm-evaluation-harness puts this token before a text (`prefix_token_id` of its `hf` model). Raises ModelError
    for a tokenizer that has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise tokenizer_error(tokenizer, "has no begin- or end-of-sequence token to put before a line")


def line_end(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text that ends each line of a prompt by default: the end-of-sequence token.

    Raises ModelError for a tokenizer that has none.
    """
    if tokenizer.eos_token is None:
        raise tokenizer_error(tokenizer, "has no end-of-sequence token, which ends each line of a prompt")
    return str(tokenizer.eos_token)


def tokenizer_error(tokenizer: "PreTrainedTokenizerBase", fault: str) -> ModelError:
    return ModelError("tokenizer", repr(tokenizer.name_or_path), f"{fault}; set one in tokenizer_config.json")
