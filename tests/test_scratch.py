"""Temporary folders: those of killed processes are removed, those in use are not."""

import signal
import subprocess
import sys
from pathlib import Path

from mlprune.storage.scratch import scratch_folder

HOLD = """
import sys, time
from pathlib import Path
from mlprune.storage.scratch import scratch_folder
with scratch_folder("x-", Path(sys.argv[1])) as folder:
    (folder / "file").write_text("")
    print(folder, flush=True)
    time.sleep(600)
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that uses a scratch folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_folders_of_killed_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    killed, left = holder(tmp_path)
    running, used = holder(tmp_path)
    (tmp_path / "x-of-others").mkdir()
    (tmp_path / "y-in-use.lock").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (left / "file").exists()
    removed: list[Path] = []
    with scratch_folder("x-", tmp_path, removed.append) as folder:
        assert folder.is_dir()
        assert removed == [left]
        assert not left.exists()
        assert (used / "file").exists()
    assert not folder.exists()
    running.kill()
    running.communicate()
    assert {file.name for file in tmp_path.iterdir()} == {used.name, "x-of-others", "y-in-use.lock"}
