"""The benchmarks run: each on a tiny model, for one round. No time is asserted.

`llmcompressor_wanda.py` is not here: it needs an environment of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.tiny_models import source

COMBINATIONS = ("mix", "max", "power=8", "variance=1", "rank")
FOLDER = Path(__file__).parents[1] / "benchmarks"


def table(script: str, *options: str, **environment: str) -> dict[str, str]:
    """Run the benchmark; return the lines that it prints, by their first column."""
    command = [sys.executable, str(FOLDER / script), "--model", str(source().folder), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=FOLDER.parent
    )
    assert done.returncode == 0, done.stderr
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())


def test_sweep_cost_prints_each_part_and_its_ratio_to_the_lower_bound() -> None:
    lines = table("sweep_cost.py", "--rounds", "1", "--prompts", "4", "--tokens", "64")
    assert list(lines) == ["(a)", "(b forwards)", "(b masks)", "(c)", "(a) / (b)"]


def test_residency_prints_a_line_for_each_and_skips_nvme_where_it_cannot_be_compiled() -> None:
    lines = table("residency.py", "--rounds", "1", "--tokens", "1024", CC="/bin/false")
    assert list(lines) == ["resident", "zero/cpu", "zero/nvme"]
    assert all("pass" in lines[name] and "masks" in lines[name] for name in ("resident", "zero/cpu"))
    assert lines["zero/nvme"].startswith("skipped: pipeline.offload: nvme: needs libaio's headers")


def test_combinations_prints_a_line_for_each_number_of_languages() -> None:
    lines = table("combinations.py", "--counts", "2,3", "--rounds", "1", "--samples", "2", "--tokens", "64")
    assert list(lines) == [" 2 languages", " 3 languages"]
    for line in lines.values():
        assert re.fullmatch(
            r"passes \S+ s, masks .* them mix \S+, max \S+, power=8 \S+, variance=1 \S+, rank \S+", line
        )


def test_forecast_prints_correlations_of_its_stored_trials_and_resumes(tmp_path: Path) -> None:
    sizes = ("--languages", "en,hi", "--seeds", "1", "--samples", "2", "--tokens", "64", "--lines", "2")
    lines = table("forecast.py", "--work", str(tmp_path), *sizes)
    files = sorted(tmp_path.glob("0-*.json"))
    trials = [json.loads(file.read_text()) for file in files]
    assert lines["trials"] == "28, of which Wanda 12"
    group = [trial for trial in trials if trial["variant"]["sparsity"] == 0.7]
    forecasts = [np.mean(trial["measures"]["share"]["hi"]) for trial in group]
    rho = spearmanr(forecasts, [trial["loss"]["hi"] for trial in group]).statistic
    assert lines[f"all at 0.7, {len(group)} trials"].endswith(f"hi {rho:.2f}")
    assert {"plain", "by energy", "error", "token error log"} < lines.keys()
    written = {file: file.stat().st_mtime_ns for file in files[1:]}
    files[0].unlink()
    assert table("forecast.py", "--work", str(tmp_path), *sizes) == lines
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == written
    assert files[0].exists()


@pytest.mark.timeout(1800)  # four sweeps over Ray
def test_search_cost_prints_times_ratios_and_winners_and_keeps_finished_sweeps(tmp_path: Path) -> None:
    sizes = ("--sparsities", "0.6", "--languages", "en,fr", "--lines", "16", "--prompts", "2", "--tokens", "300")
    options = ("--work", str(tmp_path), "--rounds", "1", "--sweeps", "ad", *sizes)
    lines = table("search_cost.py", *options)
    sweeps = {name: json.loads((tmp_path / f"0-{name}.json").read_text()) for name in "ad"}
    seconds = {name: sum(sweep["seconds"].values()) for name, sweep in sweeps.items()}
    assert lines["(d) / (a)"].startswith(f"{seconds['d'] / seconds['a']:.3f}, ")
    assert lines["(a) everything"].startswith(f"{seconds['a']:.1f} s (")
    assert "racing, 8 of 16 lines" in sweeps["d"]["seconds"]
    assert "screening" in sweeps["d"]["seconds"]
    same = sweeps["d"]["winners"] == sweeps["a"]["winners"]
    assert lines["(d) at 0.6"].startswith("the same winner") == same
    assert all(len(list((tmp_path / f"0-{name}-store" / "moments").iterdir())) for name in "ad")
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert table("search_cost.py", *options) == lines
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == written
