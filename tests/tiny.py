"""A tokenizer, corpora, and changes that make a model folder invalid, for all tests."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mlprune.data
from mlprune.data.corpora import Corpus, open_corpus
from mlprune.errors import ModelError
from mlprune.models.source import find_model

SAMPLE = Path(mlprune.data.__file__).parent / "sample"
SPECIAL = ["<s>", "</s>", "<pad>"]

# The first line has a separator inside that str.splitlines would cut at, and quotation marks.
ENGLISH = ['One "quoted\u2028line', "Two", "Three", "Four"]
FRENCH = ["Une ligne", "Deux", " Trois ", "Quatre"]
DOCUMENTS = ["a", "b", "a", "c"]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, the same in every process. It is lossless for any text."""
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


def hand_made(lines: int = 4) -> Corpus:
    return Corpus("hand", {"en": tuple(ENGLISH[:lines]), "fr": tuple(FRENCH[:lines])}, tuple(DOCUMENTS[:lines]))


def sample(*languages: str) -> Corpus:
    return open_corpus("sample", languages or ("en", "fr"))


def refused(name: str | Path, *words: str, key: str = "model.path", **options: Any) -> ModelError:
    """Check that `name` is refused in one line that contains the key, the value and `words`. Return the error."""
    with pytest.raises(ModelError) as caught:
        find_model(str(name), **options)
    line = str(caught.value)
    assert caught.value.key == key
    assert "\n" not in line
    for word in (key, *words):
        assert word in line
    if key == "model.path":
        assert str(name) in line
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict(), folder / "pytorch_model.bin")


def as_two_files(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("*.safetensors"))
