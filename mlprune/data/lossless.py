"""Checks that a tokenizer keeps the characters of a text.

Bits per byte divide the likelihood of the tokens by the bytes of the text. If the tokens say less than the text,
they are easier to predict, and the model looks better than it is. Nothing is corrected here.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLERATED = 0.001  # share of characters; SentencePiece's normalisation may change a few

logger = logging.getLogger(__name__)


def lost_characters(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Counter[str]:
    """Return the characters of `texts` that are not in the text of their tokens, and how often.

    White space and control characters are ignored, and so are differences that Unicode's compatibility form NFKC
    removes: many tokenizers apply it.
    """
    lost: Counter[str] = Counter()
    for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False).input_ids, strict=True):
        lost += Counter(_visible(text)) - Counter(_visible(tokenizer.decode(ids)))
    return lost


def _visible(text: str) -> str:
    normal = unicodedata.normalize("NFKC", text)
    return "".join(char for char in normal if unicodedata.category(char)[0] not in "CZ")


def warn_of_lost_characters(language: str, texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Log a warning if the tokens of `texts` leave out more than TOLERATED of their characters."""
    lost = lost_characters(texts, tokenizer)
    share = lost.total() / max(1, sum(len(_visible(text)) for text in texts))
    if share > TOLERATED:
        examples = " ".join(char for char, _ in lost.most_common(5))
        logger.warning(
            "the tokenizer loses %.1f%% of the characters of %s (%s): loss and bits per byte of it are too low",
            *(100 * share, language, examples),
        )
