"""A smaller vocabulary: the same pieces wherever all of them are kept, and every text is still encoded."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mlprune.cli import main
from mlprune.commands.trim import find_vocabulary
from mlprune.data.corpora import calibration_lines, held_out, open_corpus
from mlprune.errors import ModelError
from mlprune.models.source import find_model
from mlprune.models.vocabulary import cut_tokenizer, kept_tokens, renumber_config, tokenizer_values
from tests.tiny_models import config, save

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
KEPT, OTHERS = ("en", "fr"), ("sw", "hi")
CORPUS = open_corpus("sample", (*KEPT, *OTHERS))


def text(*languages: str) -> list[str]:
    """The lines that a vocabulary is found in."""
    return [CORPUS.lines[code][line] for code in languages for line in calibration_lines(CORPUS, 0)]


def bytes_bpe() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and BLOOM have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer: Any = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(text(*KEPT, *OTHERS), trainer)
    return made


def character_bpe() -> Tokenizer:
    """As Llama 2, Gemma and Mistral have: spaces are marks, and a missing character is written as bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    parts: Any = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts)
    trainer: Any = trainers.BpeTrainer(vocab_size=2500, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator([line.replace(" ", "▁") for line in text(*KEPT, *OTHERS)], trainer)
    values = json.loads(made.to_str())
    old = values["model"]["vocab"]
    places = {f"<0x{number:02X}>": len(SPECIAL) + number for number in range(256)}
    new = {word: place + 256 * (place >= len(SPECIAL)) for word, place in old.items()} | places
    values["model"]["vocab"] = dict(sorted(new.items(), key=lambda item: item[1]))
    return Tokenizer.from_str(json.dumps(values))


def unigram() -> Tokenizer:
    """As XGLM has."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=2500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(text(*KEPT, *OTHERS), trainer)
    return made


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    made = {"bytes": bytes_bpe, "characters": character_bpe, "unigram": unigram}[kind]()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def cut(kind: str) -> tuple[Tokenizer, Tokenizer, tuple[int, ...]]:
    old = tokenizer(kind).backend_tokenizer
    values = json.loads(old.to_str())
    used = {token for line in text(*KEPT) for token in old.encode(line).ids}
    kept = kept_tokens(values, used)
    return old, Tokenizer.from_str(json.dumps(cut_tokenizer(values, kept))), kept


KINDS = pytest.mark.parametrize("kind", ["bytes", "characters", "unigram"])


@KINDS
def test_text_of_kept_pieces_is_cut_as_before(kind: str) -> None:
    old, new, kept = cut(kind)
    allowed, same, others = set(kept), 0, 0
    for language in (*KEPT, *OTHERS):
        for line in CORPUS.lines[language]:
            before, after = old.encode(line).ids, new.encode(line).ids
            if set(before) <= allowed:
                assert [kept[token] for token in after] == before
                same += 1
            else:
                others += 1
            assert new.decode(after) == old.decode(before), "no character is lost that was not lost before"
    assert same > 1800, "at least the lines that the vocabulary was found in"
    assert others > 500
    assert len(kept) < 0.9 * old.get_vocab_size()


@KINDS
def test_special_tokens_bytes_and_digits_are_kept(kind: str) -> None:
    old, new, kept = cut(kind)
    vocabulary = new.get_vocab()
    assert [new.id_to_token(number) for number in range(4)] == SPECIAL
    assert sorted(vocabulary.values()) == list(range(len(kept)))
    assert all(new.id_to_token(number) == old.id_to_token(token) for number, token in enumerate(kept))
    assert all(digit in vocabulary for digit in "0123456789.,!?")
    if kind == "characters":
        assert all(f"<0x{number:02X}>" in vocabulary for number in range(256))
    assert new.encode("a", "b").ids[0] == 1
    assert new.decode(new.encode("日本 🙂 ქართული").ids) == old.decode(old.encode("日本 🙂 ქართული").ids)


def test_every_token_on_the_way_is_kept() -> None:
    """By hand: `abc` is made of `ab` and `c`; without `ab` it could not be made any more."""
    made = Tokenizer(
        models.BPE(
            {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5, "x": 6}, [("a", "b"), ("b", "c"), ("ab", "c")]
        )
    )
    values = json.loads(made.to_str())
    assert made.encode("abc").ids == [5]
    assert kept_tokens(values, [5]) == (0, 1, 2, 4, 5, 6)
    new = Tokenizer.from_str(json.dumps(cut_tokenizer(values, kept_tokens(values, [5]))))
    assert new.encode("abc").tokens == ["abc"]
    assert new.encode("bc").tokens == ["b", "c"], "bc is not kept, and neither is its merge"


def test_ids_in_a_config() -> None:
    values = {"eos_token_id": [2, 9], "pad_token_id": 7, "bos_token_id": None, "vocab_size": 10, "unk_token_id": 5}
    assert renumber_config(values, (2, 5, 7)) == {"eos_token_id": [0], "pad_token_id": 2, "unk_token_id": 1}


def model(kind: str, folder: Path) -> Path:
    """A tiny model with the tokenizer; its embedding has more rows than there are tokens."""
    vocabulary = len(tokenizer(kind)) + 24
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    save(config("llama", vocab_size=vocabulary, tie_word_embeddings=kind == "bytes", **ids), folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


@KINDS
def test_a_trimmed_model_has_the_logits_of_the_kept_tokens(kind: str, tmp_path: Path) -> None:
    folder = model(kind, tmp_path / "model")
    words = ["trim", str(folder), "--languages", "en,fr", "--output", str(tmp_path / "out"), "--json", "-"]
    result = CliRunner().invoke(main, [*words, "--set", "evaluation.perplexity.lines=12"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    kept = find_vocabulary(find_model(str(folder)), open_corpus("sample", KEPT))
    assert values["tokens"] == [len(tokenizer(kind)) + 24, len(kept)]
    old, new = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, tmp_path / "out"))
    assert (new.config.vocab_size, new.config.bos_token_id, new.config.pad_token_id) == (len(kept), 1, 3)
    assert values["size"]["parameters"] == sum(one.numel() for one in new.parameters())
    shorter = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (shorter.bos_token_id, shorter.eos_token_id, shorter.pad_token_id) == (1, 2, 3)
    line = text("en")[0]
    before, after = tokenizer(kind)(line, return_tensors="pt"), shorter(line, return_tensors="pt")
    assert [kept[token] for token in after.input_ids[0].tolist()] == before.input_ids[0].tolist()
    expected = old(**before).logits[..., list(kept)]
    torch.testing.assert_close(new(**after).logits, expected, rtol=1e-4, atol=1e-4)
    for language in KEPT:
        lines = [CORPUS.lines[language][line] for line in held_out(CORPUS)]
        lengths = [sum(map(len, one(lines).input_ids)) for one in (tokenizer(kind), shorter)]
        assert values["held_out_tokens"][language] == lengths


def test_pruning_with_a_smaller_vocabulary(tmp_path: Path) -> None:
    folder = model("bytes", tmp_path / "model")
    words = ["prune", str(folder), "--score", "magnitude", "--sparsity", "0.25", "--pattern", "channels"]
    result = CliRunner().invoke(main, [*words, "--vocabulary", "en", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = find_vocabulary(find_model(str(folder)), open_corpus("sample", ["en"]))
    assert (pruned.config.vocab_size, pruned.config.intermediate_size) == (len(kept), 36)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    rows = dense.get_input_embeddings().weight[list(kept)]
    assert torch.equal(pruned.get_input_embeddings().weight, rows)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = model("bytes", tmp_path / "model")
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]").save_pretrained(folder)
    with pytest.raises(ModelError, match="its tokenizer is WordPiece; only BPE and Unigram are cut"):
        tokenizer_values(find_model(str(folder)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--vocabulary", "en,xx"], "mlprune: --vocabulary: 'sample': has no xx; it has "),
        (["--vocabulary", "en,,fr"], "mlprune: --vocabulary: 'en,,fr': write codes with commas, e.g. en,fr"),
        (["--vocabulary-corpus", "x"], "mlprune: --vocabulary-corpus: 'x': needs --vocabulary: which languages?"),
        (["--vocabulary", "en", "--vocabulary-corpus", "x.tsv"], "mlprune: --vocabulary-corpus: 'x.tsv': no such"),
    ],
)
def test_mistakes_are_answered(options: list[str], line: str, tmp_path: Path) -> None:
    words = ["prune", "demo", "--score", "magnitude", "--sparsity", "0.25", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*words, *options])
    assert result.exit_code == 2
    assert result.stderr.startswith(line)
    assert not (tmp_path / "out").exists()
