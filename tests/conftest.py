"""What every test has: quiet hubs, and one real Ray for all tests of actors."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin on each other's cores make tiny models crawl
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("MLFLOW_TRACKING_URI", None)  # nor is a server that somebody uses
os.environ["RAY_ADDRESS"] = "local"  # a cluster that happens to run here is not ours

import pytest

from mlprune.runtime.ray_cluster import ray_for


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with ray_for(memory=8 * 2**30):
        yield
