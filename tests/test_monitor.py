"""Rates of shards from samples of their usage."""

import pytest

from mlprune.runtime.actors import ShardUsage
from mlprune.sweep.monitor import WINDOW_SECONDS, _ShardHistory


def test_rates_are_averaged_over_the_window() -> None:
    shard = _ShardHistory()
    assert shard.add(ShardUsage("a", 0.0, 0.0, 0)) == 0
    assert shard.rates() == (0, 0)
    for second in range(1, 101):  # half of the time at work; a chunk of 1000 tokens every ten seconds
        assert shard.add(ShardUsage("a", second, second / 2, second // 10 * 1000)) == 0.5
    assert shard.rates() == pytest.approx((0.5, 100))
    for second in range(101, 101 + int(WINDOW_SECONDS) + 1):  # then idle
        assert shard.add(ShardUsage("a", second, 50.0, 10_000)) == 0
    assert shard.rates() == (0, 0)


def test_rates_restart_with_another_worker() -> None:
    shard = _ShardHistory()
    shard.add(ShardUsage("a", 10.0, 8.0, 500))
    assert shard.add(None) == 0
    assert not shard.alive
    assert shard.add(ShardUsage("b", 500.0, 1.0, 100)) == 0, "work before the first sample is unknown"
    assert shard.alive
    assert shard.add(ShardUsage("b", 502.0, 2.0, 300)) == 1.0
    assert shard.rates() == (0.5, 100)
    assert shard.add(ShardUsage("b", 503.0, 0.5, 10)) == 0, (
        "it worked less than before: a third one, on the same node"
    )
    assert shard.rates() == (0, 0)
