"""Set-up of every test: no hub, no server in use, the logging of a library, one Ray for all tests of actors."""

import logging
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for the Hugging Face hub
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads slow tiny models down where cores are shared
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("MLFLOW_TRACKING_URI", None)  # nor logs to a server in use
os.environ["RAY_ADDRESS"] = "local"  # nor joins a Ray cluster that runs here

import pytest

from mlprune import console
from mlprune.runtime.connection import ray_session


@pytest.fixture(autouse=True)
def mlprune_logging() -> Iterator[None]:
    """Let `caplog` see INFO messages, and undo what a command in the test's process configures."""
    logger = logging.getLogger("mlprune")
    logger.setLevel(logging.INFO)
    yield
    logger.handlers = []
    logger.propagate = True
    console._quiet = False


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with ray_session(memory=8 * 2**30):
        yield
