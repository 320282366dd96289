"""MLflow servers that tests start, kill and start again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mlprune.errors import SpecError
from mlprune.tracking.mlflow_client import check_tracking


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """An `mlflow server` over an sqlite file, in its own process group; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        folder = self.folder
        words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        places = [
            "--backend-store-uri",
            f"sqlite:///{folder}/m.db",
            "--artifacts-destination",
            str(folder / "files"),
        ]
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words, *places],
                cwd=folder,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves 1.5 GB
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return check_tracking(self.uri)
            except SpecError:
                assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
