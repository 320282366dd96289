"""The compressor as a baseline of knowledge: entropies by hand, and what training text of a language is worth."""

import lzma
import math
import random

import pytest

from mlprune.data.corpora import calibration_lines, held_out
from mlprune.evaluation.knowledge import compressed_bits_per_byte
from tests.tiny import sample


def random_lines(seed: int, letters: str, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=200)) for _ in range(count)]


@pytest.mark.parametrize("letters", ["ab", "abcdefgh", "abcdefghijklmnopqrstuvwxyz"])
def test_random_letters_cost_their_entropy(letters: str) -> None:
    """With little above it: a line end is one more symbol, and LZMA tries matches in vain."""
    training, heldout = random_lines(0, letters, 50), random_lines(1, letters, 100)
    entropy = math.log2(len(letters))
    assert entropy < compressed_bits_per_byte(training, heldout) < 1.12 * entropy + 0.15


def test_bytes_are_those_of_the_text() -> None:
    """Four letters, seven bytes; line ends are compressed but not counted."""
    sizes = [len(lzma.compress(text.encode(), format=lzma.FORMAT_ALONE)) for text in ("a\n", "a\né€\nbc\n")]
    assert compressed_bits_per_byte(["a"], ["é€", "bc"]) == 8 * (sizes[1] - sizes[0]) / 7


def test_lines_that_were_seen_cost_next_to_nothing() -> None:
    lines = random_lines(3, "abcdefgh", 40)
    assert compressed_bits_per_byte(lines, lines[7:9]) < 0.2


def test_text_of_the_language_helps_and_more_helps_more() -> None:
    corpus = sample("en", "fr", "de", "sw", "hi")
    lines, kept = calibration_lines(corpus, 0), held_out(corpus)[:48]
    needed = {}
    for code, text in corpus.lines.items():
        heldout = [text[line] for line in kept]
        parts = [[text[line] for line in lines[:count]] for count in (0, 32, len(lines))]
        own = [compressed_bits_per_byte(part, heldout) for part in parts]
        assert own == sorted(own, reverse=True)
        foreign = corpus.lines["de" if code != "de" else "en"]
        assert compressed_bits_per_byte([foreign[line] for line in lines], heldout) > own[2] + 0.2
        needed[code] = own[2]
    assert needed == pytest.approx({"en": 2.72, "fr": 2.55, "de": 2.53, "sw": 2.44, "hi": 1.18}, abs=0.01)
