"""A sweep on a cluster, from a laptop: sent to the head as a Ray job, watched through a tunnel, and found again.

The job server wants the cluster's token. A job goes on without us; sweeps are known by their spec's key, which
their jobs carry.

The only door to `ray.job_submission`.
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
from typing import Any

from mlprune.console import errors, results, say, step, warn
from mlprune.errors import SpecError, SweepError
from mlprune.remote.job_package import Parcel, result_file
from mlprune.remote.ssh import START_SECONDS, Head, Tunnel, about, find_head, last_line

DASHBOARD, MLFLOW = 8265, 5000  # ports of the head's loopback
LOST_SECONDS = 600  # without an answer, before we stop asking
INTERRUPTED = 130


@contextmanager
def connect(file: str) -> Iterator[Cluster]:
    """The cluster of that file, for as long as the block runs. Raises UserError when it cannot be reached."""
    token = _read_token()
    with step(f"finding the head of {file}"):
        head = find_head(file)
    tunnel = Tunnel(head, (DASHBOARD, MLFLOW))
    try:
        with step(f"reaching {head.address} over ssh"):
            tunnel.open()
            cluster = Cluster(head, tunnel, token)
        yield cluster
    finally:
        tunnel.close()


def _read_token() -> str:
    """The token that opens the cluster. Raises SpecError naming the command that makes it."""
    file = Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        remedy = "the cluster's token is not there; make one: ray get-auth-token --generate; then run ray up"
        raise SpecError("--cluster", file, remedy) from None


class Cluster:
    """A cluster that is up, with a tunnel to it."""

    def __init__(self, head: Head, tunnel: Tunnel, token: str) -> None:
        self._head, self._tunnel = head, tunnel
        self._dashboard, self._mlflow = (f"http://127.0.0.1:{port}" for port in tunnel.ports)
        self._client = self._answer(lambda: _client(self._dashboard, token), START_SECONDS)

    def start(self, parcel: Parcel) -> str:
        """Submit the sweep; if the same is under way, only say so. Returns the job's id."""
        for job in self._sweeps():
            if job.metadata["key"] == parcel.spec.key and not job.status.is_terminal() and not parcel.dry_run:
                say(f"this sweep is running already, as {job.submission_id}: it is not started a second time")
                return str(job.submission_id)
        job_id = f"{parcel.spec.name}-{time.strftime('%Y%m%d-%H%M%S')}" + "-dry-run" * parcel.dry_run
        kind = "dry-run" if parcel.dry_run else "sweep"
        with tempfile.TemporaryDirectory(prefix="mlprune-") as folder, step("sending the sweep"):
            file = Path(folder, "sweep.zip")
            parcel.pack(file)
            request: dict[str, Any] = {
                "submission_id": job_id,
                "entrypoint": parcel.entrypoint(job_id),
                "metadata": {"mlprune": kind, "name": parcel.spec.name, "key": parcel.spec.key},
                "runtime_env": {"working_dir": str(file), "env_vars": {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"}},
            }
            self._answer(lambda: self._client.submit_job(**request), START_SECONDS)
        return job_id

    def latest(self) -> str:
        """The id of the sweep that runs, or else of the last one. Raises SpecError when there was none."""
        sweeps = self._sweeps()
        if not sweeps:
            start = about(self._head.file, "mlprune sweep SPEC --cluster {}")
            remedy = f"no sweep was sent there since it is up; send one: {start}"
            raise SpecError("--attach", repr(self._head.file), remedy)
        return str(max(sweeps, key=lambda job: (not job.status.is_terminal(), job.start_time or 0)).submission_id)

    def _sweeps(self) -> list[Any]:
        jobs = self._answer(lambda: self._client.list_jobs(), START_SECONDS)
        return [job for job in jobs if (job.metadata or {}).get("mlprune") == "sweep"]

    def watch(self, job_id: str) -> tuple[int, Any]:
        """Say where to look, and show the job's log until it ends: its exit code, and its result or None."""
        file = self._head.file
        say(f"{job_id} on {self._head.address}")
        say(f"  dashboard  {self._dashboard}  (for its token: ray get-auth-token)")
        say(f"  MLflow     {self._mlflow}")
        back = "back with: " + about(file, "mlprune sweep --attach --cluster {}")
        say(f"  Ctrl-C leaves it running; {back}")
        say("  stop it with: " + about(file, f"ray exec {{}} {shlex.quote(f'ray job stop {job_id}')}"))
        try:
            code = self._follow(job_id)
        except KeyboardInterrupt:
            say(f"{job_id} goes on; {back}")
            return INTERRUPTED, None
        return code, self._result(job_id, code)

    def _follow(self, job_id: str) -> int:
        """Show the job's log from its start until it ends, through breaks of the connection: its exit code.

        Raises SweepError when the cluster has not answered for long, or no longer knows the job.
        """
        from aiohttp import ClientError

        log, broken = _Log(), 0.0
        while True:
            whole = True
            try:
                asyncio.run(log.follow(self._client.tail_job_logs(job_id)))
            except (OSError, RuntimeError, ClientError) as error:
                whole = False
                if log.heard >= broken:
                    broken = time.monotonic()
                    say("  the connection to the cluster broke; the job goes on. Trying again ...")
                elif time.monotonic() - broken > LOST_SECONDS:
                    raise SweepError(f"the log of {job_id} cannot be read ({last_line(str(error))})") from None
            job = self._answer(lambda: self._client.get_job_info(job_id), LOST_SECONDS)
            if whole and job.status.is_terminal():
                return _exit_code(job)
            time.sleep(1)

    def _result(self, job_id: str, code: int) -> Any:
        """What the job wrote as JSON; None if it failed before that."""
        try:
            return json.loads(self._head.run(f"cat {result_file(job_id)}"))
        except SweepError:
            if code:
                return None
            raise

    def hold(self) -> None:
        """Keep the tunnel until Ctrl-C; without a terminal there is nobody to look through it."""
        if not errors.is_terminal:
            return
        say(f"MLflow stays at {self._mlflow} until Ctrl-C")
        try:
            while True:
                time.sleep(2)
                self._tunnel.repair()
        except KeyboardInterrupt:
            return

    def _answer(self, call: Callable[[], Any], seconds: float) -> Any:
        """What `call` returns, once the job server is there to answer it. Raises SpecError, SweepError."""
        from ray.exceptions import AuthenticationError

        deadline = time.monotonic() + seconds
        while True:
            try:
                return call()
            except AuthenticationError:
                remedy = "~/.ray/auth_token is not this cluster's token; take the file from where `ray up` was run"
                raise SpecError("--cluster", repr(self._head.file), remedy) from None
            except (OSError, RuntimeError) as error:
                _raise_if_final(error)
                if time.monotonic() > deadline:
                    up = about(self._head.file, "ray up {}")
                    cause = f"the job server of {self._head.address} does not answer ({last_line(str(error))})"
                    raise SweepError(f"{cause}; if it is not up, run: {up}") from None
            time.sleep(1)
            self._tunnel.repair()


def status(file: str) -> Any:
    """Show the sweeps that run on the head of the cluster of that file, and return them as plain values."""
    text = find_head(file).run("mlprune status --json - 2>&1")
    table, _, values = text.rpartition("\n{\n")  # JSON comes last
    results.file.write(table + "\n")
    return json.loads("{" + values)


def _raise_if_final(error: Exception) -> None:
    """Raise SweepError when the job server has answered, and would answer the same again."""
    text = last_line(str(error))
    if "does not exist" in text:
        remedy = "send the sweep again: what had finished is kept in its storage"
        raise SweepError(f"the cluster was started anew and no longer knows the job; {remedy}") from None
    if "failed with status code 4" in text:
        raise SweepError(f"the job server refuses: {text[:300]}") from None


class _Log:
    """A job's log as it grows, shown once however often it is read from its start."""

    def __init__(self) -> None:
        self._shown = 0  # characters
        self.heard = time.monotonic()

    async def follow(self, texts: AsyncIterator[str]) -> None:
        skip = self._shown
        async for text in texts:
            self.heard = time.monotonic()
            fresh, skip = text[skip:], max(0, skip - len(text))
            results.file.write(fresh)
            results.file.flush()
            self._shown += len(fresh)
            there = re.search(r"^mlprune, version (\S+)$", fresh, re.MULTILINE)
            if there and there[1] != version("mlprune"):
                warn(f"mlprune is {version('mlprune')} here and {there[1]} there: what runs is the cluster's")


def _exit_code(job: Any) -> int:
    """Of a job that has ended: its driver's, as a shell gives it."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        warn("the job was stopped")
        return 1
    if job.driver_exit_code is None:  # it did not come to run, or what watched over it died
        warn(" ".join((job.message or "the job failed").split()))
        return 1
    code = int(job.driver_exit_code)
    return code if code > 0 else 128 - code


def _client(address: str, token: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # they would go before the address given, and are another cluster's
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
