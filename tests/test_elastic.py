"""A cluster whose nodes Ray's autoscaler launches on demand, as processes of this machine."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.numbers import numbers, plain_numbers
from tests.servers import free_port
from tests.test_sweep import spec, sweep

HEAD = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
WORKER = {"resources": {"CPU": 1, "memory": 2**31}, "node_config": {}, "min_workers": 0, "max_workers": 2}
# Ray's own provider of nodes that are processes of this machine
PROVIDER = {
    "type": "external",
    "module": "tests.elastic_provider.Provider",
    "head_node_id": FAKE_HEAD_NODE_ID,
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "launch_multiple": True,
}
CLUSTER = {
    "cluster_name": "elastic",
    "max_workers": 2,
    "head_node_type": "ray.head.default",
    "available_node_types": {"ray.head.default": HEAD, "worker": WORKER},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "auth": {},
    "docker": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without CPUs; two nodes of one CPU may be launched."""
    folder, port = tempfile.mkdtemp(prefix="el"), free_port()  # Ray's sockets want short paths
    config = Path(folder) / "cluster.json"
    place = f"{ray.util.get_node_ip_address()}:{port}"
    config.write_text(json.dumps(CLUSTER | {"provider": PROVIDER | {"gcs_address": place}}))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_TMPDIR": folder,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        f"--autoscaling-config={config}",
        "--include-dashboard=false",
    ]
    with (Path(folder) / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield place
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def test_from_no_node_to_two_replicas(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"score": ["magnitude"], "calibration": [], "propagation": ["dense"]}
    expected = plain_numbers(spec(tmp_path, **few))
    monkeypatch.setenv("RAY_ADDRESS", address)
    outcome = sweep(tmp_path, "--set", "pipeline.replicas=2", **few)
    assert numbers(outcome) == expected
    log = (tmp_path / "log.txt").read_text()
    assert "waiting for resources for 1 shard(s), 1 CPU" in log, "the second node comes when it is wanted"
    assert "loading the model 2 times into 1 shard(s)" in log
