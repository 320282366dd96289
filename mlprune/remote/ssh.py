"""The head of a cluster, from a laptop, over ssh: the file that `ray up` made it of, commands, and a tunnel.

The head's dashboard, job server and MLflow are bound to its loopback, so ssh is the only way in.

The only door to `ray.autoscaler.sdk`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlprune.errors import SpecError, SweepError
from mlprune.spec.loading import read_yaml

START_SECONDS = 60  # for ssh to connect, and for a job server that has just been started
# what Ray's own launcher tells ssh, and: no questions, and no connection shared with an ssh that would outlive us
SSH_OPTIONS = {
    "StrictHostKeyChecking": "no",  # addresses of a cloud's machines are used again
    "UserKnownHostsFile": os.devnull,
    "IdentitiesOnly": "yes",
    "ExitOnForwardFailure": "yes",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ConnectTimeout": "30",
    "BatchMode": "yes",
    "LogLevel": "ERROR",
    "ControlPath": "none",
}
MARK = "mlprune:"
# Runs "$@" for as long as its standard input stays open, which ends with us however we die.
FATE = """exec 3<&0; "$@" </dev/null & child=$!
{ cat <&3 >/dev/null; kill $child; } 2>/dev/null & watch=$!
wait $child; code=$?; kill $watch 2>/dev/null; exit $code"""


@dataclass(frozen=True)
class Head:
    """The head of a cluster that is up, and how ssh reaches it."""

    file: str  # the cluster's
    address: str
    ssh: tuple[str, ...]  # the command, without what is to be done there
    inside: tuple[str, ...]  # what leads into the container where Ray runs; () without one

    def run(self, command: str) -> str:
        """Standard output of a shell command on the head, in the shell that Ray uses there. Raises SweepError."""
        command = f"source ~/.bashrc; echo {MARK}; {command}"  # before the mark is what a login says
        there = shlex.join([*self.inside, "bash", "--login", "-c", "-i", command])
        done = subprocess.run([*self.ssh, there], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = last_line(done.stderr.removesuffix("logout\n"))  # that is the shell's
            raise SweepError(f"on {self.address}: {said or f'exit code {done.returncode}'}")
        return done.stdout.partition(f"{MARK}\n")[2]


def find_head(file: str) -> Head:
    """The head of the cluster of that file. Raises SpecError when the file is none, or the cluster is not up."""
    values = check_cluster_file(file)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from ray.autoscaler.sdk import bootstrap_config, get_head_node_ip

        logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
        try:
            address = get_head_node_ip(file)
            whole = bootstrap_config(values)  # of AWS, the key is known only then
        except Exception as error:  # whatever the provider raises
            cause = last_line(str(error)) or type(error).__name__
            up = about(file, "ray up {}")
            raise SpecError("--cluster", repr(file), f"it is not up ({cause}); run: {up}") from None
    auth, docker = whole["auth"], whole.get("docker") or {}
    options = dict(SSH_OPTIONS)
    if proxy := auth.get("ssh_proxy_command"):
        options["ProxyCommand"] = proxy
    key = ["-i", auth["ssh_private_key"]] if auth.get("ssh_private_key") else []
    ssh = ["ssh", *key, *(f"-o{name}={value}" for name, value in options.items()), f"{auth['ssh_user']}@{address}"]
    engine = "podman" if docker.get("use_podman") else "docker"
    container = docker.get("container_name")
    return Head(file, address, tuple(ssh), (engine, "exec", container) if container else ())


def check_cluster_file(file: str) -> dict[str, Any]:
    """Its values as Ray reads them (YAML 1.1). Raises SpecError."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        read_yaml(text)  # more than YAML 1.1 refuses: no key twice
        values = yaml.safe_load(text)
    except OSError:
        raise SpecError("--cluster", repr(file), "no such file; name the one that `ray up` was given") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError("--cluster", repr(file), "not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(values, dict) or not {"cluster_name", "provider"} <= set(values):
        remedy = "no file of Ray's cluster launcher: cluster_name and provider are needed"
        raise SpecError("--cluster", repr(file), remedy)
    return values


class Tunnel:
    """Ports of this machine's loopback that lead, by one ssh, to ports of the head's.

    The ssh ends when this process does, however it ends.
    """

    def __init__(self, head: Head, ports: Sequence[int]) -> None:
        self._head, self._there = head, ports
        self.ports = [_free_port(port) for port in ports]
        self._start()

    def open(self) -> None:
        """Wait until it leads there. Raises SpecError with what ssh says if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not _listens(self.ports[0]):
            if self._child.poll() is not None or time.monotonic() > deadline:
                self._errors.seek(0)
                cause = last_line(self._errors.read().decode(errors="replace")) or "no connection"
                if "local forwarding" in cause and time.monotonic() < deadline:  # somebody has just taken a port
                    self.close()
                    self.ports = [_free_port(0) for _ in self._there]
                    self._start()
                    continue
                up = about(self._head.file, "ray up {}")
                remedy = f"no ssh to its head {self._head.address} ({cause}); if it is not up, run: {up}"
                raise SpecError("--cluster", repr(self._head.file), remedy)
            time.sleep(0.1)

    def repair(self) -> None:
        """Start ssh anew if it has ended; whether it then leads there is for the next call to see."""
        if self._child.poll() is not None:
            self.close()
            self._start()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._errors.close()

    def _start(self) -> None:
        pairs = zip(self.ports, self._there, strict=True)
        forwards = [f"-L127.0.0.1:{here}:127.0.0.1:{there}" for here, there in pairs]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        # a session of its own: a Ctrl-C is for us, and ssh must not ask the terminal
        self._child = subprocess.Popen(
            ["sh", "-c", FATE, "sh", self._head.ssh[0], "-N", *forwards, *self._head.ssh[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )


def _free_port(wanted: int) -> int:
    """The same number as on the head if it is free here."""
    with socket.socket() as place:
        try:
            place.bind(("127.0.0.1", wanted))
        except OSError:
            place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def last_line(text: str) -> str:
    return " ".join((text.strip().splitlines() or [""])[-1].split())


def about(file: str, command: str) -> str:
    """`command` with the cluster's file in its {}, to be copied by a person."""
    return command.format(shlex.quote(file))
