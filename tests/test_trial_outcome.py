"""Outcomes of trials as dicts of Ray Tune, and back."""

import math

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

OBJECTIVE = "bits_per_byte.mean"
OF_TUNE = {"trial_id": "a1", "done": False, "config": {"variant": {}}, "training_iteration": 1}
REPORTS = [
    Finished(1.25),
    Finished(math.inf),
    Failed("ValueError: no", "Traceback ...\nValueError: no"),
    WorkerLost("a shard's worker on 10.0.0.7 is gone with its node"),
    NotStarted("a shard's worker died"),
    Masked(),
]


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_a_report_survives_tune(report: TrialReport) -> None:
    values = to_tune(report, OBJECTIVE)
    assert from_tune(values | OF_TUNE, OBJECTIVE) == report
    value = values[OBJECTIVE]
    assert isinstance(value, float), "Optuna needs its objective in every report"
    assert isinstance(report, Finished) or value == math.inf


@pytest.mark.parametrize(
    "values", [{}, OF_TUNE, {OBJECTIVE: 1.0}, {"trial_report": "Lost", "cause": "x"}], ids=str
)
def test_another_dict_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the report of a trial"):
        from_tune(values, OBJECTIVE)
