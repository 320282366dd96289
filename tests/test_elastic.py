"""A cluster whose nodes are launched when they are asked for, by Ray's real autoscaler; all on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import AutoscalingCluster

from tests.numbers import numbers, plain_numbers
from tests.servers import free_port
from tests.test_sweep import spec, sweep

WORKERS = {"worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}}


@pytest.fixture
def address() -> Iterator[str]:
    """The address of a head without CPUs; two nodes of one CPU may be launched."""
    folder, port = tempfile.mkdtemp(prefix="el"), free_port()  # Ray's sockets want short paths
    config = Path(folder) / "cluster.json"
    config.write_text(json.dumps(AutoscalingCluster({"CPU": 0}, dict(WORKERS), autoscaler_v2=True)._config))
    told = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_TMPDIR": folder,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={port}", f"--autoscaling-config={config}", "--include-dashboard=false"]
    with (Path(folder) / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env={**os.environ, **told}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def test_from_no_node_to_two_replicas(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"score": ["magnitude"], "calibration": [], "propagation": ["dense"]}
    expected = plain_numbers(spec(tmp_path, **few))
    monkeypatch.setenv("RAY_ADDRESS", address)
    found = sweep(tmp_path, "--set", "pipeline.replicas=2", **few)
    assert numbers(found) == expected
    log = (tmp_path / "log.txt").read_text()
    assert "waiting for a first node with 1 CPU" in log
    assert "loading the model 2 times into 1 shard(s)" in log
