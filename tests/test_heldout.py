"""Held-out lines: their split into selection and confirmation, and the blocks of a race."""

import hashlib
import random
from collections.abc import Sequence

import pytest

from mlprune.data.corpora import Corpus, calibration_lines, held_out, split_held_out
from mlprune.errors import CorpusError
from mlprune.evaluation.perplexity import FIRST_BLOCK, held_out_lines, in_blocks
from mlprune.spec.evaluation import PerplexitySpec
from tests.tiny import sample


def in_hash_order(count: int) -> list[str]:
    """Return names of documents, in the order in which they are held out."""
    names = [f"document {number}" for number in range(count)]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def corpus_of(sizes: Sequence[int]) -> Corpus:
    """Return a corpus whose held-out documents have these sizes, in their order, and are its first lines."""
    names = in_hash_order(len(sizes) + 3)
    ids = [name for name, size in zip(names, sizes, strict=False) for _ in range(size)]
    ids += [name for name in names[len(sizes) :] for _ in range(sum(sizes))]
    return Corpus("hand", {"en": tuple(map(str, range(len(ids))))}, tuple(ids))


def test_documents_go_to_the_part_with_fewer_lines_and_their_lines_take_turns() -> None:
    """Documents of 3, 1, 3 and 2 lines: the first and the last are for selection, the others for confirmation."""
    corpus = corpus_of([3, 1, 3, 2])
    assert held_out(corpus) == tuple(range(9))
    split = split_held_out(corpus, confirm=True)
    assert split.selection == (0, 7, 1, 8, 2)
    assert split.confirmation == (3, 4, 5, 6)
    whole = split_held_out(corpus, confirm=False)
    assert whole.selection == (0, 3, 4, 7, 1, 5, 8, 2, 6)
    assert whole.confirmation == ()


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_share_no_document_and_are_balanced(seed: int) -> None:
    draw = random.Random(seed)
    ids = [f"document {draw.randrange(40)}" for _ in range(draw.randrange(100, 900))]
    corpus = Corpus("random", {"en": tuple(map(str, ids))}, tuple(ids))
    split = split_held_out(corpus, confirm=True)
    parts = [[corpus.documents[line] for line in part] for part in (split.selection, split.confirmation)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(split.selection + split.confirmation) == sorted(held_out(corpus))
    largest = max(ids.count(name) for name in parts[0] + parts[1])
    assert abs(len(parts[0]) - len(parts[1])) <= largest
    for part, names in zip((split.selection, split.confirmation), parts, strict=True):
        turns = [names[:place].count(name) for place, name in enumerate(names)]
        assert turns == sorted(turns), "the n-th lines of all documents come before any (n+1)-th"
        for name in set(names):
            lines = [line for line in part if corpus.documents[line] == name]
            assert lines == sorted(lines)


def test_the_split_of_the_sample_is_the_same_for_every_seed() -> None:
    corpus = sample()
    split = split_held_out(corpus, confirm=True)
    assert (len(split.selection), len(split.confirmation)) == (168, 149)
    assert len({corpus.documents[line] for line in split.selection[:8]}) == 8, "few lines, many documents"
    for seed in range(3):
        assert not {*split.selection, *split.confirmation} & set(calibration_lines(corpus, seed))


def test_as_many_lines_are_confirmed_as_selected_or_as_there_are() -> None:
    corpus = corpus_of([3, 1, 3, 2])
    split = split_held_out(corpus, confirm=True)
    for lines, confirmation, expected in ((3, None, 3), (5, None, 4), (2, 4, 4), (5, 1, 1)):
        taken = held_out_lines(PerplexitySpec(lines=lines, confirmation_lines=confirmation), corpus)
        assert taken.selection == split.selection[:lines]
        assert taken.confirmation == split.confirmation[:expected]
    off = held_out_lines(PerplexitySpec(lines=9, confirmation_lines=0), corpus)
    assert (len(off.selection), off.confirmation) == (9, ())


def test_nothing_is_confirmed_where_one_document_is_held_out() -> None:
    corpus = corpus_of([4])
    assert held_out_lines(PerplexitySpec(lines=4), corpus).confirmation == ()
    with pytest.raises(CorpusError, match=r"^evaluation.perplexity.confirmation_lines: 1: .* has 0 for confirm"):
        held_out_lines(PerplexitySpec(lines=4, confirmation_lines=1), corpus)
    with pytest.raises(CorpusError, match=r"lines: 5: .* has 4 for selection; use a smaller number$"):
        held_out_lines(PerplexitySpec(lines=5), corpus)


@pytest.mark.parametrize(
    ("lines", "sizes"),
    [
        (1, [1]),
        (15, [15]),
        (16, [8, 8]),
        (20, [8, 12]),
        (24, [8, 16]),
        (48, [8, 16, 24]),
        (64, [8, 16, 40]),
        (100, [8, 16, 32, 44]),
    ],
)
def test_sizes_of_blocks_by_hand(lines: int, sizes: list[int]) -> None:
    assert [len(block) for block in in_blocks(range(lines))] == sizes


def test_blocks_double_and_hold_every_line_once() -> None:
    for count in range(1, 700):
        lines = tuple(range(1000, 1000 + count))
        blocks = in_blocks(lines)
        assert sum((tuple(block) for block in blocks), ()) == lines
        *others, last = [len(block) for block in blocks]
        assert others == [FIRST_BLOCK * 2**number for number in range(len(others))]
        assert not others or others[-1] <= last < 4 * others[-1]
