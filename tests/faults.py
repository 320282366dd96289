"""Faults on demand. Ray runs `install` in each worker process, and workers then die where a test orders it.

A folder holds, for each method of ShardWorker, files that are taken in the order of their names, one a call. The
content is what that call does: `live`, `die`, a process id that is killed together with the worker, or
`hold:PATTERN`: wait, on a host whose name matches, until the host is killed or cut off, or the file
`.held` is removed.
"""

import functools
import json
import os
import platform
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "MLPRUNE_TEST_FAULTS"
GUILTY = "guilty"  # a file: the label of the variant whose masking always kills
METHODS = ("save_moments", "mask", "prune_through", "likelihood", "layer_weights", "peak_bytes")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of a driver whose workers read their orders in `folder`."""
    config = {
        "runtime_env": {
            "worker_process_setup_hook": "tests.faults.install",
            "env_vars": {FOLDER: str(folder), "PYTHONPATH": str(Path(__file__).parents[1])},
        }
    }
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(config)}


def order(folder: Path, method: str, calls: Sequence[str]) -> None:
    """What the next calls of the method do."""
    (folder / method).mkdir(parents=True, exist_ok=True)
    for number, what in enumerate(calls):
        (folder / method / f"{number:03d}").write_text(what)


def left(folder: Path) -> list[Path]:
    """Return the orders that no call has carried out."""
    return [file for file in folder.glob("*/*") if not file.suffix]


def install() -> None:
    from mlprune.shards.worker import ShardWorker

    folder = Path(os.environ[FOLDER])
    for method in METHODS:
        setattr(ShardWorker, method, _mortal(getattr(ShardWorker, method), folder, method))


def _mortal(original: Any, folder: Path, method: str) -> Any:
    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        guilty = folder / GUILTY
        if method == "mask" and guilty.exists() and args[0].variant.label == guilty.read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        _obey(folder / method)
        return original(self, *args, **kwargs)

    return run


def _obey(orders: Path) -> None:
    for file in sorted(orders.glob("[0-9][0-9][0-9]")):
        try:
            what = file.read_text()
            if what.startswith("hold:") and not re.search(what.removeprefix("hold:"), platform.node()):
                return  # it waits for a call on another host
            file.rename(file.with_suffix(".done"))
        except FileNotFoundError:  # another worker took it
            continue
        if what.startswith("hold:"):
            held = file.with_suffix(".held")
            held.write_text(platform.node())
            while held.exists():
                time.sleep(0.05)
            return
        if what != "live":
            if what != "die":
                os.kill(int(what), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return
