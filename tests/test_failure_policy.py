"""The failure policy: which trials run again, which run alone, and which have failed."""

import logging

import pytest

from mlprune.sweep.failure_policy import LOSSES_BEFORE_ALONE, FailureDecision, FailurePolicy
from mlprune.sweep.grid import parse_variant

A, B, C = (parse_variant("mono:en", "wanda", sparsity, "unstructured", "dense") for sparsity in (0.1, 0.2, 0.3))


def test_all_run_together_until_one_lost_workers_twice() -> None:
    policy = FailurePolicy(3)
    assert policy.next_round([A, B, C]) == ([A, B, C], False)
    for variant in (A, B):
        assert policy.record_loss(variant, "one") is FailureDecision.RETRY
    assert policy.next_round([A, B, C]) == ([A, B, C], False)
    for variant in (A, B):
        assert policy.record_loss(variant, "two") is FailureDecision.RETRY_ALONE
    assert LOSSES_BEFORE_ALONE == 2
    assert policy.next_round([A, B, C]) == ([C], False), "trials under suspicion wait"
    assert policy.next_round([A, B]) == ([A], True), "and then run alone"
    assert policy.given_up == {}
    assert policy.record_loss(A, "three") is FailureDecision.GIVE_UP
    assert policy.given_up == {A: "a worker died 3 times under it: three"}
    assert policy.decision(C) is FailureDecision.RETRY


def test_each_decision_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    policy = FailurePolicy(2)
    with caplog.at_level(logging.WARNING, "mlprune"):
        policy.record_loss(A, "a node died")
        policy.record_loss(A, "another node died")
    assert caplog.messages == [
        f"{A.label}: a node died; the trial runs again",
        f"{A.label}: another node died; the trial has failed",
    ]
