"""The head of a cluster, over ssh: its address from the file that `ray up` was given, commands, and a tunnel.

What runs on the cluster is known to `jobs`. The head's dashboard, job server and MLflow listen on its loopback
only, so ssh is the only way to reach them.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mlprune.errors import SpecError, SweepError
from mlprune.spec.loading import read_yaml

logger = logging.getLogger(__name__)

START_SECONDS = 60  # for ssh to connect, and for a job server that has just been started
# The options that Ray's own launcher passes to ssh; and no questions, and no connection shared with an ssh that
# outlives us.
SSH_OPTIONS = {
    "StrictHostKeyChecking": "no",  # clouds reuse the addresses of machines
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
OUTPUT_MARKER = "mlprune:"
# Runs "$@" until its standard input is closed, which happens when our process ends in any way.
DIE_WITH_PARENT = """exec 3<&0; "$@" </dev/null & child=$!
{ cat <&3 >/dev/null; kill $child; } 2>/dev/null & watch=$!
wait $child; code=$?; kill $watch 2>/dev/null; exit $code"""


@dataclass(frozen=True)
class Head:
    """The head node of a running cluster, and how ssh reaches it."""

    file: str  # the cluster's file
    address: str
    ssh: tuple[str, ...]  # the ssh command, without the command to run on the head
    container: tuple[str, ...]  # prefix of commands that run in Ray's container; () if Ray runs without one

    def run(self, command: str) -> str:
        """Return the standard output of a shell command, run on the head in Ray's shell. Raises SweepError."""
        command = (
            f"source ~/.bashrc; echo {OUTPUT_MARKER}; {command}"  # what a login prints comes before the marker
        )
        remote_command = shlex.join([*self.container, "bash", "--login", "-c", "-i", command])
        done = subprocess.run(
            [*self.ssh, remote_command], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            message = last_line(done.stderr.removesuffix("logout\n"))  # printed by the login shell
            raise SweepError(f"on {self.address}: {message or f'exit code {done.returncode}'}")
        return done.stdout.partition(f"{OUTPUT_MARKER}\n")[2]


def find_head(file: str) -> Head:
    """Return the head of the cluster of that file.

    Raises SpecError if the file is no cluster file or the cluster is not up.
    """
    values = check_cluster_file(file)
    # the cloud providers' modules print what they do
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from ray.autoscaler.sdk import bootstrap_config, get_head_node_ip

        logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
        try:
            address: str = get_head_node_ip(file)
            config = bootstrap_config(values)  # on AWS, only this knows the ssh key
        except Exception as error:  # each provider raises its own
            cause = last_line(str(error)) or type(error).__name__
            remedy = f"the cluster is not up ({cause}); run: {command_for(file, 'ray up {}')}"
            raise SpecError("--cluster", repr(file), remedy) from None
    docker = config.get("docker") or {}
    engine, container = "podman" if docker.get("use_podman") else "docker", docker.get("container_name")
    return Head(
        file, address, _ssh_command(config["auth"], address), (engine, "exec", container) if container else ()
    )


def _ssh_command(auth: Mapping[str, str], address: str) -> tuple[str, ...]:
    options = dict(SSH_OPTIONS)
    if proxy := auth.get("ssh_proxy_command"):
        options["ProxyCommand"] = proxy
    key = ["-i", auth["ssh_private_key"]] if auth.get("ssh_private_key") else []
    return (
        "ssh",
        *key,
        *(f"-o{name}={value}" for name, value in options.items()),
        f"{auth['ssh_user']}@{address}",
    )


def check_cluster_file(file: str) -> dict[str, object]:
    """Return the values of a cluster file, parsed like Ray does (YAML 1.1). Raises SpecError."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        read_yaml(text)  # stricter than YAML 1.1: it refuses duplicate keys
        values = yaml.safe_load(text)
    except OSError:
        remedy = "no such file; use the one that `ray up` was given"
        raise SpecError("--cluster", repr(file), remedy) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError("--cluster", repr(file), "not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(values, dict) or not {"cluster_name", "provider"} <= set(values):
        remedy = "not a file of Ray's cluster launcher: cluster_name and provider are required"
        raise SpecError("--cluster", repr(file), remedy)
    return values


class Tunnel:
    """Ports of this machine's loopback that one ssh process forwards to ports of the head's loopback.

    The ssh process ends when this process does, even if it is killed.
    """

    def __init__(self, head: Head, ports: Sequence[int]) -> None:
        self._head, self._remote_ports = head, ports
        self.ports = [_free_port(port) for port in ports]
        self._start()

    def open(self) -> None:
        """Wait until ssh forwards the ports. Raises SpecError with ssh's error message if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not _listens(self.ports[0]):
            if self._ssh.poll() is not None or time.monotonic() > deadline:
                self._errors.seek(0)
                cause = last_line(self._errors.read().decode(errors="replace")) or "no connection"
                # another process has taken a port since we looked for free ones
                if "local forwarding" in cause and time.monotonic() < deadline:
                    self.close()
                    self.ports = [_free_port(0) for _ in self._remote_ports]
                    self._start()
                    continue
                up = command_for(self._head.file, "ray up {}")
                remedy = f"no ssh to the head {self._head.address} ({cause}); if the cluster is not up, run: {up}"
                raise SpecError("--cluster", repr(self._head.file), remedy)
            time.sleep(0.1)

    def reconnect(self) -> None:
        """Start ssh again if it has ended. Does not wait until it is connected: the next call over it will see."""
        if self._ssh.poll() is not None:
            logger.debug("the ssh tunnel ended with exit code %d: starting a new one", self._ssh.returncode)
            self.close()
            self._start()

    def close(self) -> None:
        """End the ssh process."""
        assert self._ssh.stdin is not None
        self._ssh.stdin.close()
        self._ssh.wait()
        self._errors.close()

    def _start(self) -> None:
        pairs = zip(self.ports, self._remote_ports, strict=True)
        forwards = [f"-L127.0.0.1:{local}:127.0.0.1:{remote}" for local, remote in pairs]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._ssh = subprocess.Popen(
            ["sh", "-c", DIE_WITH_PARENT, "sh", self._head.ssh[0], "-N", *forwards, *self._head.ssh[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C must not reach ssh, and ssh must not ask the terminal
        )


def _free_port(preferred: int) -> int:
    """Return `preferred`, the port's number on the head, if it is free on this machine; else another free port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def last_line(text: str) -> str:
    """Return the last line of a text, with single spaces."""
    return " ".join((text.strip().splitlines() or [""])[-1].split())


def command_for(file: str, command: str) -> str:
    """Return `command` with the quoted cluster file in place of its {}, for the user to copy."""
    return command.format(shlex.quote(file))
