"""Random deaths in every phase of a sweep: afterwards the numbers are those of an undisturbed run.

CHAOS_ROUNDS rounds (`make chaos` runs 30) are drawn from CHAOS_SEED; a test's name says who dies in which phase.
What tests/test_deaths.py does on purpose, this does by chance; and here Ray's own processes die too.
"""

import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlprune.runtime.connection import _kill_processes_of
from mlprune.runtime.restarts import CLUSTER_LOST_SECONDS, RESTARTS
from tests import faults
from tests.numbers import Numbers, numbers, plain_numbers
from tests.servers import free_port
from tests.test_deaths import check_runs, done, spec, start

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
SEED = os.environ.get("CHAOS_SEED", "0")
# phase -> the worker's method that is called in it, and how many calls pass before the one that is held
PHASES = {
    "calibration": ("save_moments", 2),
    "masking": ("mask", 3),
    "sequential": ("prune_through", 3),
    "evaluation": ("likelihood", 8),
    "ranking": ("peak_bytes", 1),
}
RAY = ("raylet", "gcs_server")
VICTIMS = ("driver", "group", "shard", "trial", *RAY)
Deaths = Sequence[tuple[str, str]]  # who dies in which phase


def drawn(number: int) -> Deaths:
    """Return the deaths of a round: one or two."""
    rng = random.Random(f"{SEED} {number}")
    phases = sorted(rng.choices(list(PHASES), k=rng.choice((1, 1, 2))), key=list(PHASES).index)
    # there are processes of trials only while trials run
    return [
        (rng.choice([one for one in VICTIMS if one != "trial" or phase in ("masking", "sequential")]), phase)
        for phase in phases
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return plain_numbers(spec(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path of a socket has 107 bytes at most
        yield Path(folder)


def sweep_with_deaths(folder: Path, short: Path, deaths: Deaths, calls: random.Random, code: int = 0) -> Any:
    """Run a sweep in which these die, again after each death of the driver; return what it says in the end."""

    def hold(phase: str) -> Path:
        method, most = PHASES[phase]
        passed = calls.randrange(most)
        faults.order(folder / "faults", method, [*["live"] * passed, "hold:"])
        return folder / "faults" / method / f"{passed:03d}.held"

    file, environment = spec(folder), {"RAY_TMPDIR": str(short)}
    process = None
    for victim, phase in deaths:
        held = hold(phase)
        if process is None or process.poll() is not None:
            process = start(folder, "sweep", str(file), **environment)
        await_file(held, process, folder)
        kill(victim, process)
        held.unlink(missing_ok=True)
        if victim in ("driver", "group"):
            assert process.wait(60) == -signal.SIGKILL
    if process is not None and process.poll() is None:
        assert process.wait(300) == code, (folder / "log.txt").read_text()
    return None if code else done(folder, "sweep", str(file), code=0, **environment)


def await_file(file: Path, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < deadline, f"{file}\n{(folder / 'log.txt').read_text()}"
        time.sleep(0.05)


def kill(victim: str, process: subprocess.Popen[bytes]) -> None:
    if victim == "driver":
        process.kill()
    elif victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        found = [one for one in psutil.Process(process.pid).children(recursive=True) if is_victim(one, victim)]
        assert found, f"no process of {victim}"
        found[-1].kill()


def is_victim(process: psutil.Process, victim: str) -> bool:
    try:
        name, command = process.name(), " ".join(process.cmdline())
    except psutil.Error:
        return False
    if victim == "shard":
        return command.startswith("ray::RankActor")
    if victim == "trial":
        return command.startswith("ray::") and "RankActor" not in command and "IDLE" not in command
    return name == victim and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [pytest.param(n, id="-".join(map("@".join, drawn(n)))) for n in range(ROUNDS)])
@pytest.mark.timeout(900)
def test_nothing_is_lost_when_processes_die_by_chance(
    undisturbed: Numbers, tmp_path: Path, short: Path, number: int
) -> None:
    outcome = sweep_with_deaths(tmp_path, short, drawn(number), random.Random(number))
    assert numbers(outcome) == undisturbed
    check_runs(outcome, {"FINISHED"})
    assert list(short.iterdir()) == [], "a folder of Ray is left"


@pytest.mark.timeout(900)  # six starts of Ray
def test_ray_is_started_again_three_times_and_then_the_command_ends(
    undisturbed: Numbers, tmp_path: Path, short: Path
) -> None:
    deaths = [("raylet", "calibration"), ("gcs_server", "masking"), ("raylet", "evaluation")]
    assert len(deaths) == RESTARTS
    sweep_with_deaths(tmp_path, short, [*deaths, ("gcs_server", "evaluation")], random.Random(0), code=1)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    restarts = [line for line in lines if "is started again" in line]
    assert [line.split()[1:4] for line in restarts] == [["Ray's", name, "died;"] for name, _ in deaths]
    assert lines[-1].startswith("mlprune: Ray's own processes died 4 times; ")
    assert not any("Traceback" in line for line in lines)

    outcome = sweep_with_deaths(tmp_path, short, [("raylet", "ranking")], random.Random(0))
    assert numbers(outcome) == undisturbed
    check_runs(outcome, {"FINISHED"})


@pytest.mark.timeout(300)
def test_a_cluster_that_is_lost_ends_the_command_in_one_line(tmp_path: Path, short: Path) -> None:
    """Before Ray aborts the process with a C++ stack."""
    port = free_port()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(short),
    }
    words = f"start --head --num-cpus=2 --port={port} --node-ip-address=127.0.0.1 --include-dashboard=false"
    ray = str(Path(sys.executable).with_name("ray"))
    try:
        subprocess.run([ray, *words.split()], env={**os.environ, **environment}, check=True, capture_output=True)
        faults.order(tmp_path / "faults", "mask", ["hold:"])
        environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        process = start(tmp_path, "sweep", str(spec(tmp_path)), **environment)
        await_file(tmp_path / "faults" / "mask" / "000.held", process, tmp_path)
        (gcs,) = [one for one in psutil.process_iter(["cmdline"]) if is_gcs_in(one, short)]
        gcs.kill()
        assert process.wait(120) == 1
    finally:
        _kill_processes_of(short)
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    lost = rf"error: the Ray cluster at [\d.]+:{port} has not answered for {CLUSTER_LOST_SECONDS} s; "
    assert re.fullmatch(lost + "run the same command to resume when it is up", last)


def is_gcs_in(process: psutil.Process, folder: Path) -> bool:
    words = process.info["cmdline"] or [""]
    return words[0].endswith("gcs_server") and any(f"{folder}/" in word for word in words)
