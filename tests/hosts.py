"""Machines on one machine, each with a network, processes, shared memory and root's home of its own, and sshd.

They share this machine's files, but for root's home and Ray's folder: this checkout and its environment are on all
of them. `ray stop` ends every Ray process that it sees; in a host it sees the host's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

PROJECT = Path(__file__).parent.parent
TOOLS = ("ip", "unshare", "setpriv", "sshd", "ssh", "ssh-keygen", "rsync")
DASHBOARD, MLFLOW = "http://127.0.0.1:8265", "http://127.0.0.1:5000"
VENV = Path(sys.prefix)
# said on the head: what an address says, asked with a token
ASK = """
import sys, urllib.error, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]})
try:
    answer = urllib.request.urlopen(asked, timeout=20)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode())
"""
NUMBER = re.compile(r"^mlp(\d+)")
SBIN = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
BARE = {"PATH": SBIN, "HOME": os.environ["HOME"]}  # of what we learnt ourselves a host knows nothing

# what a host does first; its process 1 stays to reap what others leave
START = """
set -e
mount --make-rprivate /
mount --bind ray /tmp/ray
mount --bind ../etc-hosts /etc/hosts
mount -t tmpfs shm /dev/shm
mount -t overlay home -o lowerdir="$HOME",upperdir="$PWD/home",workdir="$PWD/work" "$HOME"
hostname "$1"
"$2" -D -e -f "$PWD/sshd_config" &
while :; do wait -n || sleep 0.5; done
"""
SSHD = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""


def why_not() -> str | None:
    """What keeps hosts from being made here; None if nothing does."""
    if os.geteuid() != 0:
        return "only root makes hosts"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=SBIN)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b", "c", "d"):
            (Path(folder) / name).mkdir()
        trial = "ip link add mlp0 type bridge && mount -t overlay o -o lowerdir=a,upperdir=b,workdir=c d"
        tried = _run("unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", trial, check=False, cwd=folder)
    return f"not permitted: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """`count` hosts, numbered from 0, while the block runs. They die with this process, however it dies."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder.resolve()
        self.key = self.folder / "key"  # opens root's account on all hosts, from here and from each other
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self._net, self._lock = _claim()
        self.name = f"mlp{self._net}"  # of the bridge between them; theirs begin with it
        self.addresses = [f"10.205.{self._net}.{number + 1}" for number in range(self._count)]
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        _remove(self._net)
        self._lock.close()

    def run(self, number: int, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The command, by ssh, in the user's shell; its output as text."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        words = [word for option in options for word in ("-o", option)]
        target = f"root@{self.addresses[number]}"
        return _run("ssh", "-i", str(self.key), *words, target, command, check=False, timeout=timeout)

    def kill_raylet(self, number: int) -> None:
        assert self.run(number, "pkill -9 -x raylet").returncode == 0

    def cut(self, number: int) -> None:
        """The cable is out: what is sent is lost, and nobody is told."""
        _run("ip", "link", "set", f"{self.name}v{number}", "down")

    def join(self, number: int) -> None:
        _run("ip", "link", "set", f"{self.name}v{number}", "up")
        _wait_for_port(self.addresses[number], 22)

    def kill(self, number: int) -> None:
        """The power is out: no connection is closed, every process is gone."""
        self.cut(number)
        self._processes[number].kill()
        self._processes[number].wait()

    def _start(self) -> None:
        Path("/tmp/ray").mkdir(exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        names = [f"{address} {self.name}n{number}" for number, address in enumerate(self.addresses)]
        (self.folder / "etc-hosts").write_text("\n".join(("127.0.0.1 localhost", *names, "")))
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "address", "add", f"10.205.{self._net}.254/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")
        for number, address in enumerate(self.addresses):
            self._wire(number, address)
            self._processes.append(self._boot(number, address))
        for address in self.addresses:
            _wait_for_port(address, 22)

    def _wire(self, number: int, address: str) -> None:
        host, cable = f"{self.name}n{number}", f"{self.name}v{number}"
        _run("ip", "netns", "add", host)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
        _run("ip", "link", "set", cable, "master", self.name, "up")
        _run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", host, "link", "set", "eth0", "up")
        _run("ip", "-n", host, "link", "set", "lo", "up")

    def _boot(self, number: int, address: str) -> subprocess.Popen[bytes]:
        host, own = f"{self.name}n{number}", self.folder / f"host{number}"
        for name in ("ray", "home", "work"):
            (own / name).mkdir(parents=True)
        for name in (".bashrc", ".profile"):
            shutil.copy(f"/etc/skel/{name}", own / "home")  # a new user's, whatever root's are here
        (own / "sshd_config").write_text(SSHD.format(address=address, folder=self.folder))
        # each of these becomes the next: what we hold is `unshare`, which dies with us, and the host with it
        chain = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host, "unshare"]
        chain += ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
        sshd = shutil.which("sshd", path=SBIN) or "sshd"
        with (own / "log.txt").open("wb") as log:
            command = [*chain, "bash", "-c", START, "start", host, sshd]
            return subprocess.Popen(command, cwd=own, env=BARE, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _claim() -> tuple[int, TextIO]:
    """A number that no living run has, and its lock. What runs that were killed have left is removed.

    The system takes the lock from whoever dies, so what bears an unlocked number has no owner.
    """
    for net in {int(name[0]) for name in map(NUMBER.findall, links() + _namespaces()) if name}:
        if lock := _lock(net):
            _remove(net)
            lock.close()
    for net in range(1, 250):
        if lock := _lock(net):
            return net, lock
    raise AssertionError("249 runs at the same time")


def _lock(net: int) -> TextIO | None:
    lock = Path(f"/run/mlprune-hosts-{net}.lock").open("w")  # noqa: SIM115 (held until the hosts have gone)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _remove(net: int) -> None:
    """Whatever bears this number: processes, namespaces, cables and the bridge."""
    ours = re.compile(rf"mlp{net}([nv]\d+)?")
    for name in filter(ours.fullmatch, _namespaces()):
        for pid in _run("ip", "netns", "pids", name).stdout.split():
            with contextlib.suppress(ProcessLookupError):  # it was another's child, and died with it
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", name)
    for name in filter(ours.fullmatch, links()):
        _run("ip", "link", "delete", name, check=False)  # a cable's two ends go together


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").stdout.splitlines()]


def links() -> list[str]:
    return [link["ifname"] for link in json.loads(_run("ip", "-json", "link").stdout)]


def _run(*words: str, check: bool = True, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=check, capture_output=True, text=True, env=BARE, **given)


def _wait_for_port(address: str, port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {address}:{port}"
            time.sleep(0.02)


WHY_NOT = why_not()
needs_hosts = pytest.mark.skipif(WHY_NOT is not None, reason=f"hosts cannot be made: {WHY_NOT}")


class Cluster:
    """What `ray up` makes of the first `nodes` hosts with the committed cluster/local.yaml; host 0 is the head."""

    def __init__(self, hosts: Hosts, nodes: int) -> None:
        self.hosts = hosts
        self.addresses = hosts.addresses[:nodes]
        self.home = hosts.folder / "laptop"  # of the person who says `ray up`: the token, and Ray's own notes
        self.home.mkdir()
        self.file = hosts.folder / "local.yaml"
        self.file.write_text(_filled_in(self.addresses, hosts.key))
        self.ray("get-auth-token", "--generate")
        self.token = (self.home / ".ray" / "auth_token").read_text().strip()

    def ray(self, command: str, *words: str) -> str:
        """A command of Ray's on the laptop, as documented: from the project's root."""
        return self._on_the_laptop("ray", command, *words)

    def mlprune(self, command: str, *words: str) -> str:
        return self._on_the_laptop("mlprune", command, *words)

    def _on_the_laptop(self, program: str, *words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(self.home), "TMPDIR": str(self.home), "RAY_TMPDIR": str(self.home)}
        done = subprocess.run(
            [str(VENV / "bin" / program), *words],
            cwd=PROJECT,
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def ask(self, url: str, token: str = "nobody's") -> tuple[int, str]:
        """What an address of the head's loopback answers: a status, 0 if nobody is there, and the page."""
        answer = self.hosts.run(0, f"{VENV}/bin/python -c {shlex.quote(ASK)} {url} {shlex.quote(token)}").stdout
        status, _, page = answer.partition(" ")
        return int(status or 0), page

    def alive(self) -> list[str]:
        """The addresses of the nodes that the head holds to be alive; none if it does not answer."""
        status, page = self.ask(f"{DASHBOARD}/api/v0/nodes", self.token)
        nodes = json.loads(page)["data"]["result"]["result"] if status == 200 else []
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")

    def wait_for(self, nodes: int, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while len(alive := self.alive()) != nodes:
            assert time.monotonic() < deadline, f"alive are {alive}, not {nodes} nodes"
            time.sleep(0.2)


def cluster(hosts: Hosts, nodes: int) -> Cluster:
    """Ray, MLflow and mlprune on the first `nodes` hosts, all alive."""
    made = Cluster(hosts, nodes)
    made.ray("up", "-y", str(made.file))
    made.wait_for(nodes)
    return made


def _filled_in(addresses: list[str], key: Path) -> str:
    """cluster/local.yaml as somebody would fill it in, with this environment in place of a new one."""
    head, *workers = addresses
    changes = {
        "cluster_name: mlprune": f"cluster_name: mlprune-{head}",
        "head_ip: 192.168.1.10  # CHANGE": f"head_ip: {head}",
        "worker_ips: [192.168.1.11, 192.168.1.12]  # CHANGE": f"worker_ips: [{', '.join(workers)}]",
        "ssh_user: ubuntu  # CHANGE": "ssh_user: root",
        "ssh_private_key: ~/.ssh/id_ed25519  # CHANGE": f"ssh_private_key: {key}",
        "node-setup.sh ~/mlprune-env": f"node-setup.sh {VENV}",
    }
    text = (PROJECT / "cluster" / "local.yaml").read_text()
    for line, filled in changes.items():
        assert text.count(line) == 1, f"cluster/local.yaml no longer says, once: {line}"
        text = text.replace(line, filled)
    assert "# CHANGE" not in text
    return text
