"""Rows of token ids to be scored from a start on: which positions count, and what the key follows."""

from dataclasses import replace
from random import Random

import pytest
import torch

from mlprune.data.batches import build_row_set
from mlprune.data.corpora import held_out
from mlprune.data.heldout import build_heldout_rows
from tests.tiny import sample, tokenizer


def random_rows(random: Random, count: int = 25) -> tuple[list[list[int]], list[int]]:
    rows = [[random.randrange(384) for _ in range(random.randint(2, 90))] for _ in range(count)]
    return rows, [random.randint(1, len(row) - 1) for row in rows]


@pytest.mark.parametrize("pad_free", [False, True])
def test_the_scored_mask_is_where_a_state_predicts_a_scored_token(pad_free: bool) -> None:
    for seed in range(5):
        rows, starts = random_rows(Random(seed))
        made = build_row_set(rows, starts, pad=7, pad_free=pad_free)
        assert made.count == 25
        found = [number for batch in made.batches for number in batch.rows]
        assert sorted(found) == list(range(25))
        for batch in made.batches:
            assert (batch.tokens == batch.input_ids.numel()) or not pad_free
            for b, row in enumerate(batch.rows):
                assert batch.input_ids[b].tolist() == rows[row] + [7] * (max(batch.lengths) - len(rows[row]))
                for t in range(batch.input_ids.shape[1]):
                    told = t + 1  # the token that the state at t tells
                    scored = told < len(rows[row]) and told >= starts[row]
                    assert bool(batch.scored_mask[b, t]) is scored
            assert batch.scored_mask.dtype == torch.bool
            assert not batch.scored_mask[:, -1].any()
        told_in_all = sum(int(batch.scored_mask.sum()) for batch in made.batches)
        assert told_in_all == sum(len(row) - start for row, start in zip(rows, starts, strict=True))


def test_without_starts_every_token_but_the_first_is_scored() -> None:
    made, _ = build_heldout_rows(
        sample(), ["en", "fr"], tokenizer(), lines=held_out(sample())[:30], max_positions=None
    )
    for batch in made.batches:
        assert batch.starts == ()
        from_first = replace(batch, starts=(1,) * len(batch.rows))
        assert torch.equal(batch.scored_mask, from_first.scored_mask)
        assert batch.scored_mask.sum(1).tolist() == [length - 1 for length in batch.lengths]
    assert made.count == 60


def test_the_key_of_rows_follows_ids_starts_and_layout() -> None:
    rows, starts = random_rows(Random(0))
    key = build_row_set(rows, starts, pad=7).key
    assert key == build_row_set([tuple(row) for row in rows], tuple(starts), pad=7).key
    other = next(n for n, row in enumerate(rows) if len(row) > starts[n] + 1)
    moved = [start + (n == other) for n, start in enumerate(starts)]
    changed = [[*row[:-1], row[-1] ^ (n == 3)] for n, row in enumerate(rows)]
    others = [
        build_row_set(rows, moved, pad=7),
        build_row_set(changed, starts, pad=7),
        build_row_set(rows, starts, 7, pad_free=True),
    ]
    others += [build_row_set(rows[::-1], starts[::-1], pad=7), build_row_set(rows[:-1], starts[:-1], pad=7)]
    assert len({key, *(made.key for made in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("pad_free", "lines_key", "rows_key"),
    [
        (False, "651466ed2b940bec7aca8d6f681572bc", "78ad2c11e6c289d0b8bf06abe92d542c"),
        (True, "38d0525ef77c3d021b0ba3189f70c037", "e966421ca73a8a3fe1c558470b8ea66b"),
    ],
)
def test_keys_stay_as_they_are(pad_free: bool, lines_key: str, rows_key: str) -> None:
    """Stored results are found by these keys, so a change here makes every store worthless."""
    lines, _ = build_heldout_rows(
        sample(), ["en", "fr"], tokenizer(), lines=held_out(sample())[:30], max_positions=None, pad_free=pad_free
    )
    assert lines.key == lines_key
    assert build_row_set(*random_rows(Random(0)), pad=7, pad_free=pad_free).key == rows_key


@pytest.mark.parametrize(("row", "start"), [([5], 1), ([5, 6], 2), ([5, 6], 0), ([], 1)])
def test_a_row_without_a_token_to_score_is_our_mistake(row: list[int], start: int) -> None:
    with pytest.raises(AssertionError):
        build_row_set([[1, 2, 3], row], [1, start], pad=0)
