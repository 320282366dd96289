"""The benchmarks run: each on a tiny model, for one round. No time is asserted.

`llmcompressor_wanda.py` is not here: it needs an environment of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import source

FOLDER = Path(__file__).parents[1] / "benchmarks"


def table(script: str, *options: str, **environment: str) -> dict[str, str]:
    """Run the benchmark; return the lines that it prints, by their first column."""
    command = [sys.executable, str(FOLDER / script), "--model", str(source().folder), "--rounds", "1", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=FOLDER.parent
    )
    assert done.returncode == 0, done.stderr
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())


def test_sweep_cost_prints_each_part_and_its_ratio_to_the_lower_bound() -> None:
    lines = table("sweep_cost.py", "--prompts", "4", "--tokens", "64")
    assert list(lines) == ["(a)", "(b forwards)", "(b masks)", "(c)", "(a) / (b)"]


def test_residency_prints_a_line_for_each_and_skips_nvme_where_it_cannot_be_compiled() -> None:
    lines = table("residency.py", "--tokens", "1024", CC="/bin/false")
    assert list(lines) == ["resident", "zero/cpu", "zero/nvme"]
    assert all("pass" in lines[name] and "masks" in lines[name] for name in ("resident", "zero/cpu"))
    assert lines["zero/nvme"].startswith("skipped: pipeline.offload: nvme: needs libaio's headers")
