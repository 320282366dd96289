"""Machines of one's own: `ray up cluster/local.yaml` over ssh, on three hosts, and a sweep across them."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc  # type: ignore[import-untyped]
import pytest

from tests import faults
from tests.hosts import DASHBOARD, MLFLOW, PROJECT, VENV, Cluster, Hosts, cluster, links, needs_hosts
from tests.numbers import numbers, plain_numbers
from tests.test_sweep import spec

pytestmark = needs_hosts

NODES = 3
# one of each service that Ray listens for
CALLS = [
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.RayletDriver/ClusterInfo",
]
REFUSALS = ({"401"}, {"403"}, {"UNAUTHENTICATED"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Hosts(NODES, tmp_path_factory.mktemp("hosts")) as hosts:
        yield cluster(hosts, NODES)


def listening(hosts: Hosts, number: int) -> set[tuple[str, int]]:
    """Addresses and ports at which this host can be reached, ssh left out; * for all addresses."""
    lines = hosts.run(number, "ss -Hltn").stdout.splitlines()
    places = [line.split()[3].rpartition(":") for line in lines]
    found = {(re.sub(r"^\[(::ffff:)?|\]$", "", address), int(port)) for address, _, port in places}
    return {(address.replace("0.0.0.0", "*"), port) for address, port in found if port != 22}


def answer(place: str, call: str, token: str | None) -> str:
    """What a gRPC server says to a call with this token: the name of its status."""
    given = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(place) as channel:
        try:
            channel.unary_unary(f"/{call}")(b"", timeout=20, metadata=given)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def to_a_stranger(place: str, token: str | None) -> set[str]:
    """All that a port says to somebody without the cluster's token, be it HTTP or gRPC."""
    try:
        asked = Request(f"http://{place}/", headers={"Authorization": f"Bearer {token}"} if token else {})
        with urlopen(asked, timeout=20) as page:
            return {str(page.status)}
    except HTTPError as error:
        return {str(error.code)}
    except (OSError, HTTPException):  # not HTTP
        return {answer(place, call, token) for call in CALLS} - {"UNIMPLEMENTED"}


def reaches(hosts: Hosts, number: int, address: str) -> bool:
    return hosts.run(number, f"timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/22'").returncode == 0


def test_a_host_is_cut_off_joined_again_and_dies(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        here, there = hosts.addresses
        assert hosts.run(1, "hostname").stdout == f"{hosts.name}n1\n"
        assert reaches(hosts, 0, there)
        hosts.cut(1)
        assert not reaches(hosts, 0, there)
        hosts.join(1)
        assert any(reaches(hosts, 1, here) for _ in range(10)), "neighbours take a moment to find each other again"
        assert reaches(hosts, 0, there)
        hosts.kill(1)
        assert not reaches(hosts, 0, there)


def test_what_a_killed_run_leaves_dies_with_it_and_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, after = tmp_path / "killed", tmp_path / "after"
    killed.mkdir()
    after.mkdir()
    script = "import os, sys; from pathlib import Path; from tests.hosts import Hosts\n"
    script += "with Hosts(1, Path(sys.argv[1])) as hosts: print(hosts.name, flush=True); os.kill(os.getpid(), 9)"
    died = subprocess.run([sys.executable, "-c", script, killed], cwd=PROJECT, capture_output=True, text=True)
    assert died.returncode == -9
    name = died.stdout.strip()
    left = f"for _ in $(seq 50); do pgrep -f {killed}/host0/sshd_[c]onfig || exit 0; sleep 0.1; done; exit 1"
    assert subprocess.run(["bash", "-c", left], check=False).returncode == 0, "it lives on"
    with Hosts(1, after) as one, Hosts(1, tmp_path) as other:
        assert one.name != other.name
        assert reaches(one, 0, one.addresses[0])
        assert not reaches(one, 0, other.addresses[0])
    assert not [link for link in links() if link.startswith(name)]


def test_all_nodes_are_alive_at_their_private_addresses(made: Cluster) -> None:
    assert made.alive() == made.addresses


def test_every_port_that_others_reach_asks_for_the_token(made: Cluster) -> None:
    assert answer(f"{made.addresses[0]}:6379", CALLS[0], made.token) == "OK"
    for number, address in enumerate(made.addresses):
        places = listening(made.hosts, number)
        assert {place for place, _ in places} <= {"127.0.0.1", address, "*"}
        ports = {port for place, port in places if place != "127.0.0.1"}
        assert len(ports) >= 5, "a raylet's two, its two agents' three"
        for wrong in (None, "0" * 64):
            answers = {port: to_a_stranger(f"{address}:{port}", wrong) for port in ports}
            assert all(said in REFUSALS for said in answers.values()), answers


def test_the_dashboard_and_mlflow_are_on_the_heads_loopback_alone(made: Cluster) -> None:
    places = listening(made.hosts, 0)
    assert {place for place, port in places if port in (5000, 8265)} == {"127.0.0.1"}
    assert not {port for _, port in listening(made.hosts, 1) | listening(made.hosts, 2)} & {5000, 8265}
    assert made.ask(f"{MLFLOW}/health") == (200, "OK\n")
    assert made.ask(f"{DASHBOARD}/api/v0/nodes")[0] == 403


def test_a_sweep_sent_from_a_laptop_gives_one_machines_numbers(made: Cluster, tmp_path: Path) -> None:
    file, out = spec(tmp_path, calibration=["mono:en"], score=["wanda"], sparsity=[0.5]), tmp_path / "out.json"
    sent = ["sweep", str(file), "--cluster", str(made.file), "--set", "pipeline.shards=3", "--json", str(out)]
    told = made.mlprune(*sent)
    across = json.loads(out.read_text())
    assert len(across["ranking"]) == 2, "dense and sequential"
    assert numbers(across) == plain_numbers(file)
    assert sorted(across["nodes"]) == made.addresses, "one shard a node"
    assert across["tracking_uri"] == MLFLOW
    assert re.search(r"http://127.0.0.1:\d+", told), "MLflow's address"
    again = made.mlprune("sweep", "--attach", "--cluster", str(made.file))
    assert "tiny: 2 variants by loss.mean" in told
    assert "tiny: 2 variants by loss.mean" in again
    assert "no sweep runs" in made.mlprune("status", "--cluster", str(made.file))


def held(orders: Path, call: int) -> int:
    """The number of the host whose worker stays where it is, once it does."""
    file, deadline = orders / f"{call:03d}.held", time.monotonic() + 300
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, sorted(orders.iterdir())
        time.sleep(0.1)
    return int(file.read_text()[-1])


def test_a_node_dies_and_another_is_cut_off_while_trials_run(made: Cluster, tmp_path: Path) -> None:
    """Each time a worker is amid a trial, not on the head. Two shards on three nodes, one to spare."""
    file, out, orders = spec(tmp_path, propagation=["dense"]), tmp_path / "out.json", tmp_path / "faults" / "mask"
    faults.order(tmp_path / "faults", "mask", ["live", "live", "live", "hold:n[12]$", "live", "hold:n[12]$"])
    given = " ".join(f"{k}={shlex.quote(v)}" for k, v in faults.environment(tmp_path / "faults").items())
    command = f"{given} HF_HUB_OFFLINE=1 mlprune sweep {file} --set pipeline.shards=2 --json {out}"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(made.hosts.run, 0, command, 400)
        made.hosts.kill_raylet(held(orders, 3))
        cut = held(orders, 5)
        made.hosts.cut(cut)
        try:
            done = running.result()
        finally:
            made.hosts.join(cut)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("is gone with its node") >= 2, done.stderr
    assert numbers(json.loads(out.read_text())) == plain_numbers(file)
    made.wait_for(NODES)


def test_the_mlflow_server_is_started_again_but_not_twice(made: Cluster) -> None:
    start, servers = "bash ~/mlprune/cluster/mlflow-server.sh", "pgrep -f '[m]lflow server --host'"
    first = made.hosts.run(0, f"{start} && {servers}").stdout.split()
    assert len(first) == 1
    made.hosts.run(0, f"kill {first[0]}; while {servers}; do sleep 0.1; done")
    second = made.hosts.run(0, f"{start} && {servers}").stdout.split()
    assert len(second) == 1
    assert second != first
    assert made.ask(f"{MLFLOW}/health") == (200, "OK\n")


def test_setting_a_node_up_again_changes_nothing(made: Cluster) -> None:
    files = "md5sum ~/.bashrc ~/.mlprune.sh"
    before = made.hosts.run(1, files).stdout
    again = made.hosts.run(1, f"bash ~/mlprune/cluster/node-setup.sh {VENV} && {files}")
    assert again.stdout == before
    assert len(before.splitlines()) == 2


def test_ray_down_ends_the_head(made: Cluster) -> None:
    made.ray("down", "-y", str(made.file))
    assert made.hosts.run(0, "pgrep -x 'raylet|gcs_server'").returncode == 1
    assert made.alive() == []
    assert made.ask(f"{MLFLOW}/health") == (200, "OK\n"), "what was measured stays there to be read"
