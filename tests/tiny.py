"""Models and tokenizers made on the spot, for every test."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mlprune.data

SAMPLE = Path(mlprune.data.__file__).parent / "sample"
SPECIAL = ["<s>", "</s>", "<pad>"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, the same in every process: any text survives it."""
    tiny = Tokenizer(models.BPE())
    tiny.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    text = [line for code in ("en", "fr", "hi") for line in _head(code)]
    tiny.train_from_iterator(text, trainer)
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tiny, bos_token=bos, eos_token=eos, pad_token=pad)


def _head(code: str) -> list[str]:
    return (SAMPLE / f"{code}.txt").read_text(encoding="utf-8").split("\n")[:40]
