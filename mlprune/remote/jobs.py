"""Cluster: a sweep as a Ray job on a cluster: submitted from a laptop, watched over ssh, and found again later.

What a job consists of is in `job_package`, how the head is reached in `ssh`.

The job server requires the cluster's token. A job keeps running without us. Sweeps are recognised by their spec's
key, which is part of the job's metadata.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlprune.console import errors, results, step
from mlprune.errors import SpecError, SweepError
from mlprune.remote.job_package import JobPackage, result_file
from mlprune.remote.ssh import START_SECONDS, Head, Tunnel, command_for, find_head, last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
logger = logging.getLogger(__name__)

DASHBOARD, MLFLOW = 8265, 5000  # ports of the head's loopback
LOST_SECONDS = 600  # without an answer, until we give up
INTERRUPTED = 130  # exit code after Ctrl-C


@contextmanager
def connect(file: str) -> Iterator[Cluster]:
    """Connect to the cluster of that file for the block. Raises UserError if it cannot be reached."""
    token = _read_token()
    with step(f"finding the head of {file}"):
        head = find_head(file)
    tunnel = Tunnel(head, (DASHBOARD, MLFLOW))
    try:
        with step(f"connecting to {head.address} over ssh"):
            tunnel.open()
            cluster = Cluster(head, tunnel, token)
        yield cluster
    finally:
        tunnel.close()


def _read_token() -> str:
    """Return the token of the user's clusters. Raises SpecError naming the command that generates it."""
    file = Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        remedy = "the cluster's token is missing; run: ray get-auth-token --generate; then: ray up"
        raise SpecError("--cluster", file, remedy) from None


class Cluster:
    """A running cluster, with a tunnel to it."""

    def __init__(self, head: Head, tunnel: Tunnel, token: str) -> None:
        self._head, self._tunnel = head, tunnel
        self._dashboard, self._mlflow = (f"http://127.0.0.1:{port}" for port in tunnel.ports)
        self._client = self._call(lambda: _open_client(self._dashboard, token), START_SECONDS)

    def start(self, package: JobPackage) -> str:
        """Submit the sweep, unless the same sweep is already running. Returns the job's id."""
        for job in self._sweep_jobs():
            if job.metadata["key"] == package.spec.key and not job.status.is_terminal() and not package.dry_run:
                logger.info("this sweep is already running, as %s: it is not started again", job.submission_id)
                return str(job.submission_id)
        job_id = f"{package.spec.name}-{time.strftime('%Y%m%d-%H%M%S')}" + "-dry-run" * package.dry_run
        kind = "dry-run" if package.dry_run else "sweep"
        with tempfile.TemporaryDirectory(prefix="mlprune-") as folder, step("sending the sweep"):
            file = Path(folder, "sweep.zip")
            package.pack(file)
            env_vars = {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
            self._call(
                lambda: self._client.submit_job(
                    entrypoint=package.entrypoint(job_id),
                    submission_id=job_id,
                    metadata={"mlprune": kind, "name": package.spec.name, "key": package.spec.key},
                    runtime_env={"working_dir": str(file), "env_vars": env_vars},
                ),
                START_SECONDS,
            )
        return job_id

    def latest(self) -> str:
        """Return the id of the running sweep, or else of the last one. Raises SpecError if there was none."""
        sweeps = self._sweep_jobs()
        if not sweeps:
            start = command_for(self._head.file, "mlprune sweep SPEC --cluster {}")
            remedy = f"no sweep was sent to this cluster since it was started; send one: {start}"
            raise SpecError("--attach", repr(self._head.file), remedy)
        return str(max(sweeps, key=lambda job: (not job.status.is_terminal(), job.start_time or 0)).submission_id)

    def _sweep_jobs(self) -> list[JobDetails]:
        jobs: list[JobDetails] = self._call(lambda: self._client.list_jobs(), START_SECONDS)
        return [job for job in jobs if (job.metadata or {}).get("mlprune") == "sweep"]

    def watch(self, job_id: str) -> tuple[int, dict[str, object] | None]:
        """Print where to look, and the job's log until it ends. Returns its exit code, and its result or None."""
        file = self._head.file
        attach = "watch it again with: " + command_for(file, "mlprune sweep --attach --cluster {}")
        stop = command_for(file, f"ray exec {{}} {shlex.quote(f'ray job stop {job_id}')}")
        logger.info("%s on %s", job_id, self._head.address)
        logger.info("  dashboard  %s  (its token: ray get-auth-token)", self._dashboard)
        logger.info("  MLflow     %s", self._mlflow)
        logger.info("  Ctrl-C leaves the job running; %s", attach)
        logger.info("  stop it with: %s", stop)
        try:
            code = self._follow(job_id)
        except KeyboardInterrupt:
            logger.info("%s keeps running; %s", job_id, attach)
            return INTERRUPTED, None
        return code, self._result(job_id, code)

    def _follow(self, job_id: str) -> int:
        """Print the job's log from its start until the job ends, and return its exit code.

        Lost connections are opened again. Raises SweepError if the cluster has not answered for LOST_SECONDS, or
        does not know the job any more.
        """
        from aiohttp import ClientError

        log, lost_at = _Log(), 0.0
        while True:
            complete = True
            try:
                asyncio.run(log.follow(self._client.tail_job_logs(job_id)))
            except (OSError, RuntimeError, ClientError) as error:
                complete = False
                if log.last_received >= lost_at:
                    lost_at = time.monotonic()
                    logger.info("  lost the connection to the cluster; the job keeps running. Reconnecting ...")
                elif time.monotonic() - lost_at > LOST_SECONDS:
                    raise SweepError(f"the log of {job_id} cannot be read ({last_line(str(error))})") from None
            job = self._call(lambda: self._client.get_job_info(job_id), LOST_SECONDS)
            if complete and job.status.is_terminal():
                return _exit_code(job)
            time.sleep(1)

    def _result(self, job_id: str, code: int) -> dict[str, object] | None:
        """Return what the job wrote as JSON; None if it failed before that."""
        try:
            result: dict[str, object] = json.loads(self._head.run(f"cat {result_file(job_id)}"))
            return result
        except SweepError:
            if code:
                return None
            raise

    def keep_tunnel_open(self) -> None:
        """Keep the tunnel open until Ctrl-C; not without a terminal, where nobody uses it."""
        if not errors.is_terminal:
            return
        logger.info("MLflow stays at %s until Ctrl-C", self._mlflow)
        try:
            while True:
                time.sleep(2)
                self._tunnel.reconnect()
        except KeyboardInterrupt:
            return

    def _call(self, request: Callable[[], T], seconds: float) -> T:
        """Return what `request` returns; it is repeated for `seconds` until the job server answers.

        Raises SpecError if the token is wrong, SweepError if the server refuses or does not answer.
        """
        from ray.exceptions import AuthenticationError

        deadline = time.monotonic() + seconds
        while True:
            try:
                return request()
            except AuthenticationError:
                remedy = "~/.ray/auth_token is not this cluster's token; copy it from where `ray up` was run"
                raise SpecError("--cluster", repr(self._head.file), remedy) from None
            except (OSError, RuntimeError) as error:
                _raise_if_final(error)
                if time.monotonic() > deadline:
                    up = command_for(self._head.file, "ray up {}")
                    cause = f"the job server of {self._head.address} does not answer ({last_line(str(error))})"
                    raise SweepError(f"{cause}; if the cluster is not up, run: {up}") from None
            time.sleep(1)
            self._tunnel.reconnect()


def cluster_status(file: str) -> dict[str, object]:
    """Print the sweeps that run on the head of the cluster of that file, and return them as plain values."""
    text = find_head(file).run("mlprune status --json - 2>&1")
    table, _, values = text.rpartition("\n{\n")  # the JSON comes last
    results.file.write(table + "\n")
    status: dict[str, object] = json.loads("{" + values)
    return status


def _raise_if_final(error: Exception) -> None:
    """Raise SweepError if the job server has answered, and would answer the same again."""
    text = last_line(str(error))
    if "does not exist" in text:
        remedy = "send the sweep again: finished trials are kept in its storage"
        raise SweepError(f"the cluster was restarted and does not know the job any more; {remedy}") from None
    if "failed with status code 4" in text:
        raise SweepError(f"the job server refuses: {text[:300]}") from None


class _Log:
    """A growing job log. Each character is printed once, however often the log is read from its start."""

    def __init__(self) -> None:
        self._printed = 0  # characters
        self.last_received = time.monotonic()

    async def follow(self, texts: AsyncIterator[str]) -> None:
        """Print what was not printed yet, as it arrives."""
        skip = self._printed
        async for text in texts:
            self.last_received = time.monotonic()
            new, skip = text[skip:], max(0, skip - len(text))
            results.file.write(new)
            results.file.flush()
            self._printed += len(new)
            _compare_versions(new)


def _compare_versions(text: str) -> None:
    """Warn if the log says that the cluster has another version of mlprune."""
    local, remote = version("mlprune"), re.search(r"^mlprune, version (\S+)$", text, re.MULTILINE)
    if remote and remote[1] != local:
        logger.warning("mlprune is %s here and %s on the cluster, which runs its own version", local, remote[1])


def _exit_code(job: JobDetails) -> int:
    """Return the exit code of the driver of a job that has ended, as a shell gives it."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        logger.warning("the job was stopped")
        return 1
    if job.driver_exit_code is None:  # the driver did not start, or its supervisor died
        logger.warning(" ".join((job.message or "the job failed").split()))
        return 1
    code = int(job.driver_exit_code)
    return code if code > 0 else 128 - code


def _open_client(address: str, token: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # they name another cluster, and take precedence over `address`
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
