"""Text to token batches: which lines are used for what, and the tokens that come out."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch

from mlprune.data import batches
from mlprune.data.batches import MICRO_BATCH_TOKENS, Batch, RowSet
from mlprune.data.calibration import CalibrationSet, build_calibration_set
from mlprune.data.corpora import Corpus, held_out
from mlprune.data.heldout import Line, build_heldout_rows
from mlprune.errors import CorpusError, ModelError
from mlprune.spec.calibrations import Demonstration
from tests.tiny import SAMPLE, sample, tokenizer

TRANSLATION = Demonstration.parse("translation:en-fr")
FRENCH_ONLY = Demonstration.parse("mono:fr")


def calibrated(
    demonstration: Demonstration = TRANSLATION,
    samples: int = 12,
    shots: int = 3,
    tokens_by: Any = None,
    **more: Any,
) -> CalibrationSet:
    settings = {"max_tokens": 200, "seed": 0} | more
    tokens_by = tokens_by or tokenizer()
    return build_calibration_set(sample(), demonstration, tokens_by, samples=samples, shots=shots, **settings)


def evaluated(lines: int = 30, tokens_by: Any = None, **more: Any) -> RowSet:
    return evaluated_lines(lines, tokens_by, **more)[0]


def evaluated_lines(lines: int = 30, tokens_by: Any = None, **more: Any) -> tuple[RowSet, tuple[Line, ...]]:
    settings = {"max_positions": None} | more
    return build_heldout_rows(
        sample(), ["en", "fr"], tokens_by or tokenizer(), lines=held_out(sample())[:lines], **settings
    )


def without_pads(batches: tuple[Batch, ...]) -> dict[int, list[int]]:
    """Row -> its tokens, as the masks tell them apart; a row in two batches is an error."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for row, ids, mask in zip(batch.rows, batch.input_ids, batch.attention_mask, strict=True):
            assert row not in found
            found[row] = ids[mask.bool()].tolist()
    return found


# Calibration


def test_every_kind_sees_the_same_lines_whatever_languages_were_opened() -> None:
    lines = [
        [made.lines for made in made_set.prompts]
        for made_set in (
            calibrated(TRANSLATION),
            calibrated(FRENCH_ONLY),
            build_calibration_set(
                sample("hi"),
                Demonstration.parse("mono:hi"),
                tokenizer(),
                samples=12,
                shots=3,
                max_tokens=9,
                seed=0,
            ),
        )
    ]
    assert lines[0] == lines[1] == lines[2]
    assert lines[0] != [made.lines for made in calibrated(seed=1).prompts]


@pytest.mark.parametrize("pad_free", [False, True])
def test_batches_hold_every_row_once_and_nothing_but_its_tokens(pad_free: bool) -> None:
    made = calibrated(samples=40, max_tokens=700, pad_free=pad_free)
    rows = without_pads(made.batches)
    assert rows == {row: list(prompt.ids) for row, prompt in enumerate(made.prompts)}
    assert made.tokens == sum(len(ids) for ids in rows.values())
    assert len(made.batches) > 1
    for batch in made.batches:
        assert batch.input_ids.dtype == torch.int64
        assert batch.input_ids.shape == (len(batch.rows), max(batch.lengths))
        assert len(batch.rows) == 1 or batch.input_ids.numel() <= MICRO_BATCH_TOKENS
        assert batch.tokens == int(batch.attention_mask.sum())
    lengths = [length for batch in made.batches for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)
    pads = sum(batch.input_ids.numel() - batch.tokens for batch in made.batches)
    assert (pads == 0) is pad_free


def test_batches_are_filled_up_to_the_limit() -> None:
    full = MICRO_BATCH_TOKENS // 64
    made = calibrated(samples=2 * full + 3, max_tokens=64)
    assert [len(batch.rows) for batch in made.batches] == [full, full, 3]
    assert [row for batch in made.batches for row in batch.rows] == list(range(2 * full + 3))  # ties in order
    long = calibrated(samples=2, shots=60, max_tokens=MICRO_BATCH_TOKENS + 1)
    assert [batch.lengths for batch in long.batches] == [(MICRO_BATCH_TOKENS + 1,)] * 2


def test_a_manifest_is_enough_to_make_the_tokens_again() -> None:
    made = calibrated(samples=20, max_tokens=500)
    manifests = json.loads(json.dumps([prompt.manifest() for prompt in made.prompts]))
    english, french = ((SAMPLE / f"{code}.txt").read_text("utf-8").split("\n") for code in ("en", "fr"))
    for manifest, prompt_ in zip(manifests, made.prompts, strict=True):
        assert (manifest["corpus"], manifest["kind"]) == ("sample", "translation:en-fr")
        numbers = [number - 1 for number in manifest["lines"]]
        text = "".join(f"English: {english[n]}</s>French: {french[n]}</s>" for n in numbers)
        ids = tokenizer()(text).input_ids
        assert tuple(ids[: manifest["tokens"]]) == prompt_.ids
        assert manifest["tokens"] == min(len(ids), 500)
    counts = [manifest["tokens"] for manifest in manifests]
    assert min(counts) < max(counts) == 500  # some whole, some cut


def test_the_key_follows_the_tokens_and_their_layout() -> None:
    key = calibrated().key
    assert key == calibrated().key
    assert len(key) == 32
    others = [calibrated(FRENCH_ONLY), calibrated(shots=2), calibrated(seed=1), calibrated(max_tokens=199)]
    others += [calibrated(samples=11), calibrated(max_tokens=700), calibrated(max_tokens=700, pad_free=True)]
    others += [calibrated(template="{text}"), calibrated(separator="\n")]
    others.append(calibrated(max_tokens=700, count_padding=True))
    assert len({key, *(other.key for other in others)}) == 1 + len(others)


def test_keys_of_calibration_sets_stay_as_they_are() -> None:
    """Stored moments and results are found by these keys."""
    assert calibrated().key == "156f63537e7bd37ae7a235e7853a2600"
    assert calibrated(FRENCH_ONLY, max_tokens=700).key == "c72e4a59f1e827fc060c5433475d8ae3"
    padded = calibrated(FRENCH_ONLY, max_tokens=700, count_padding=True)
    assert padded.key == "ad4a6942e14dc9ed2b5268ccfe4d5231"


def test_template_and_separator_reach_the_tokens_and_spare_the_end_of_sequence() -> None:
    bare = deepcopy(tokenizer())
    bare.eos_token = None
    made = calibrated(tokens_by=bare, template="[{language}] {text}", separator="\n", max_tokens=700)
    corpus = sample()
    for prompt in made.prompts:
        pairs = [(corpus.lines["en"][n - 1], corpus.lines["fr"][n - 1]) for n in prompt.lines]
        text = "".join(f"[English] {english}\n[French] {french}\n" for english, french in pairs)
        assert prompt.ids == tuple(tokenizer()(text).input_ids[:700])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", None])
def test_padding_that_counts_is_that_of_the_papers_code(side: str, pad: str | None) -> None:
    own = deepcopy(tokenizer())
    own.padding_side, own.pad_token = side, pad
    embedded = len(own)
    made = calibrated(tokens_by=own, count_padding=True, max_tokens=700)
    plain = calibrated(max_tokens=700)
    assert (own.pad_token, len(own)) == (pad, embedded), "no row is added to the embedding"
    own.pad_token = pad or own.eos_token
    rows = without_pads(made.batches)
    for number, prompt in enumerate(made.prompts):
        lines = [(sample().lines["en"][n - 1], sample().lines["fr"][n - 1]) for n in prompt.lines]
        text = "".join(f"English: {english}</s>French: {french}</s>" for english, french in lines)
        literal = own(text, truncation=True, max_length=700, padding="max_length").input_ids
        assert rows[number] == literal
    assert made.tokens == 12 * 700 > plain.tokens
    assert {length for batch in made.batches for length in batch.lengths} == {700}
    assert all(bool(batch.attention_mask.all()) for batch in made.batches)
    assert made.prompts == plain.prompts  # what is counted differs, not the text


def test_padding_that_counts_is_cut_into_micro_batches_as_ever_and_needs_a_token() -> None:
    made = calibrated(samples=20, count_padding=True, max_tokens=300)
    assert [len(batch.rows) for batch in made.batches] == [MICRO_BATCH_TOKENS // 300] * 6 + [2]
    assert [row for batch in made.batches for row in batch.rows] == list(range(20))
    cut = calibrated(max_tokens=30)
    assert calibrated(max_tokens=30, count_padding=True).key == cut.key  # nothing to pad: the same moments
    bare = deepcopy(tokenizer())
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ModelError, match=r"^tokenizer: .* has no token to pad with"):
        calibrated(tokens_by=bare, count_padding=True, separator="\n")


def test_the_key_follows_the_layout_of_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated(max_tokens=64)
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 4 * 64)
    split = calibrated(max_tokens=64)
    assert split.prompts == whole.prompts
    assert (len(split.batches), len(whole.batches)) == (3, 1)
    assert split.key != whole.key


def test_the_key_changes_with_one_token() -> None:
    def key(last: str) -> str:
        columns = {"en": ("One", "Two", "Three", last, "Held out")}
        corpus = Corpus("hand", columns, ("a", "a", "a", "a", "b"))
        assert held_out(corpus) == (4,)
        mono = Demonstration.parse("mono:en")
        return build_calibration_set(corpus, mono, tokenizer(), samples=2, shots=2, max_tokens=99, seed=0).key

    assert key("4") == key("4") != key("5")


def test_keys_are_the_same_in_a_process_with_another_hash_seed() -> None:
    here = [calibrated().key, evaluated().key, *map(str, held_out(sample()))]
    code = "from tests.test_calibration import *; print(calibrated().key, evaluated().key, *held_out(sample()))"
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        assert done.stdout.split() == here


@pytest.mark.parametrize("pad_free", [False, True])
def test_a_line_is_scored_alone_after_one_token_of_context(pad_free: bool) -> None:
    (made, lines), corpus = evaluated_lines(pad_free=pad_free), sample()
    numbers = [line + 1 for line in held_out(corpus)[:30]]
    assert [(line.language, line.number) for line in lines] == [(c, n) for c in ("en", "fr") for n in numbers]
    rows = without_pads(made.batches)
    assert sorted(rows) == list(range(60))
    for row, line in enumerate(lines):
        text = corpus.lines[line.language][line.number - 1]
        assert rows[row][0] == tokenizer().bos_token_id
        assert tokenizer().decode(rows[row][1:]) == text
        assert line.bytes == len(text.encode("utf-8"))
    pads = sum(batch.input_ids.numel() - batch.tokens for batch in made.batches)
    assert (pads == 0) is pad_free


def test_a_tokenizer_without_the_tokens_it_needs_falls_back_or_is_refused() -> None:
    bare = deepcopy(tokenizer())
    bare.bos_token = bare.pad_token = None
    batch, usual = evaluated(tokens_by=bare).batches[0], evaluated().batches[0]
    assert set(batch.input_ids[:, 0].tolist()) == {bare.eos_token_id}
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {bare.eos_token_id}
    mask_BT = usual.attention_mask[:, 1:].bool()
    assert torch.equal(batch.input_ids[:, 1:][mask_BT], usual.input_ids[:, 1:][mask_BT])
    bare.eos_token = None
    with pytest.raises(ModelError, match=r"^tokenizer: .* has no begin- or end-of-sequence token"):
        evaluated(tokens_by=bare)
    with pytest.raises(ModelError, match=r"^tokenizer: .* has no end-of-sequence token"):
        build_calibration_set(sample(), TRANSLATION, bare, samples=1, shots=1, max_tokens=9, seed=0)


def test_a_line_too_long_for_the_model_is_named() -> None:
    made, lines = evaluated_lines()
    longest = max(length for batch in made.batches for length in batch.lengths)
    assert evaluated(max_positions=longest).key == made.key
    line = lines[made.batches[0].rows[0]]
    with pytest.raises(CorpusError) as caught:
        evaluated(max_positions=longest - 1)
    remedy = f"line {line.number} of {line.language} is {longest} tokens with its context; the model takes "
    assert str(caught.value) == f"calibration.corpus: 'sample': {remedy}{longest - 1}: shorten the line"
