"""The log level of worker processes: MLPRUNE_LOG_LEVEL of the driver."""

import logging

import pytest
import ray

from mlprune.errors import SpecError
from mlprune.runtime.actors import rank_actor
from mlprune.runtime.connection import worker_environment
from mlprune.runtime.worker_logging import LEVEL_VARIABLE, configure_worker_logging


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("value", "level"), [(None, logging.WARNING), ("debug", logging.DEBUG)])
def test_workers_log_at_the_level_of_the_driver(
    value: str | None, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(LEVEL_VARIABLE, value)
    actor = rank_actor({"num_cpus": 0, "runtime_env": {"env_vars": worker_environment()}})
    try:
        assert ray.get(actor.__ray_call__.remote(lambda _: logging.getLogger("mlprune").level)) == level
    finally:
        ray.kill(actor)


def test_messages_below_the_level_are_dropped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "INFO")
    configure_worker_logging()
    logging.getLogger("mlprune.shards").debug("a detail")
    logging.getLogger("mlprune.shards").info("a step")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO mlprune.shards: a step"]


def test_a_level_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "loud")
    with pytest.raises(SpecError, match="MLPRUNE_LOG_LEVEL: 'loud': choose one of DEBUG, INFO"):
        worker_environment()
