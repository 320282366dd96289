"""Outcomes of trials as dicts of Ray Tune, and back."""

import pytest

from mlprune.sweep.trial_outcome import (
    Failed,
    Finished,
    Masked,
    NotStarted,
    TrialReport,
    WorkerLost,
    from_tune,
    to_tune,
)

OF_TUNE = {"trial_id": "a1", "done": False, "config": {"variant": {}}, "training_iteration": 1}
REPORTS = [
    Finished(),
    Failed("ValueError: no", "Traceback ...\nValueError: no"),
    WorkerLost("a shard's worker on 10.0.0.7 is gone with its node"),
    NotStarted("a shard's worker died"),
    Masked(),
]


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_a_report_survives_tune(report: TrialReport) -> None:
    assert from_tune(to_tune(report) | OF_TUNE) == report


@pytest.mark.parametrize("values", [{}, OF_TUNE, {"trial_report": "Lost", "cause": "x"}], ids=str)
def test_another_dict_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the report of a trial"):
        from_tune(values)
