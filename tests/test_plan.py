"""`mlprune plan`: plans from a configuration alone, and the plans that docs/scale.md shows."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner

from mlprune.cli import main
from mlprune.commands.plan import MachineOptions, ScalePlan, plan_scale
from mlprune.console import time_text
from mlprune.planning.forecast import DISK_BYTES_PER_SECOND, EFFICIENCY, MASKED_PER_SECOND
from mlprune.runtime.nodes import cluster_machine
from mlprune.spec.loading import load_spec
from tests.tiny_models import config

ROOT = Path(__file__).parent.parent
GIB = 2**30
MODELS = {
    "Llama-3.1-70B": "llama-3.1-70b",
    "BLOOM-176B": "bloom-176b",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
}


def planned(model: str, *settings: str, **options: Any) -> ScalePlan:
    node = {"gpus_per_node": 4, "gpu_memory": 48 * 10**9, "host_memory": 384 * GIB, "flops": 362e12}
    path = ROOT / "docs" / "models" / f"{model}.json"
    return plan_scale(
        load_spec("quickstart", [f"model.path={path}", *settings]), MachineOptions(**{**node, **options})
    )


def row(name: str, nodes: int) -> str:
    """Return a row of the table in docs/scale.md."""
    scale = planned(MODELS[name], nodes=nodes)
    assert scale.plan is not None
    most = max(scale.plan.memory, key=lambda need: need.total)
    shards = len(scale.plan.spans)
    host = max(need.host for need in scale.plan.memory) / GIB
    disk = max(need.disk for need in scale.plan.memory) / GIB
    sizes = [most.weights, most.working, most.hidden + most.activations, most.moments, most.masks, most.total]
    cells = [
        name,
        nodes,
        shards,
        scale.plan.trials,
        scale.plan.residency,
        *(f"{size / GIB:.1f}" for size in sizes),
    ]
    cells += [f"{host:.1f}", f"{disk:.1f}", time_text(sum(phase.seconds for phase in scale.phases))]
    return f"| {' | '.join(map(str, cells))} |"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_documented_plans_are_current(name: str, nodes: int) -> None:
    assert row(name, nodes) in (ROOT / "docs" / "scale.md").read_text()


def test_the_worked_example_adds_up() -> None:
    """The largest worker of BLOOM-176B on one node, from the model's dimensions, by hand."""
    scale = planned("bloom-176b", nodes=1)
    assert scale.plan is not None
    need, width, words = scale.plan.memory[3], 14336, 250880
    matrices = 3 * width**2 + width**2 + 2 * 4 * width**2  # query_key_value, dense, two of the MLP
    small = 3 * width + width + 4 * width + width + 4 * width  # biases, and two norms of a weight and a bias
    assert scale.model_size.layers[60] == 2 * (matrices + small)
    assert need.weights == 2 * words * width  # head and embedding are one, and both ends of the model have it
    assert need.working == 2 * scale.model_size.packed * 2 + 14 * 4 * width**2  # two layers; scores of the largest
    assert need.hidden == 5 * 8192 * width * 2  # five sets of 8192 tokens at once
    assert need.moments == (5 * 17 + 1) * (width + width + width + 4 * width) * 8
    assert need.masks == 2 * 17 * matrices // 8
    assert need.logits == 512 * words * (2 + 8)
    process = (400 + 90 + 64) * 2**20
    assert need.host == pytest.approx(process + 2 * need.hidden + 17 * scale.model_size.layers[60])


def test_time_by_hand() -> None:
    """Llama-3.1-70B on eight nodes: 32 shards of 2 or 3 layers, all resident."""
    scale = planned("llama-3.1-70b", nodes=8)
    assert scale.plan is not None
    phases = {phase.name: phase for phase in scale.phases}
    flops = 362e12 * EFFICIENCY["gpu"]
    tokens, shards, layers = 5 * 8192, 32, 3
    chunk = tokens / (4 * shards)
    turn = 2 * chunk * (scale.model_size.active + 2 * 256 * 8192 * 80) * layers / 80 / flops
    assert phases["calibration"].seconds == pytest.approx((4 * shards + shards - 1) * turn)
    assert phases["calibration"].weights_moved == 0
    assert phases["calibration"].hidden_moved == tokens * 8192 * 2
    assert phases["masks"].seconds == pytest.approx(10 * layers * 855638016 / MASKED_PER_SECOND["gpu"])
    assert phases["loading the model"].seconds == pytest.approx(scale.model_size.total / 8 / DISK_BYTES_PER_SECOND)


def test_single_layers_are_evaluated_once_for_all_variants() -> None:
    """80 layers at two sparsities, and the dense model, on 8 lines of 64 tokens in each of three languages."""
    times = {}
    for allocations in ("uniform", "sensitivity-mean", "sensitivity-mean,sensitivity-worst"):
        scale = planned("llama-3.1-70b", f"search.allocation=[{allocations}]", nodes=8)
        times[allocations] = {phase.name: phase.seconds for phase in scale.phases}.get(
            "evaluation of single pruned layers"
        )
    assert times["uniform"] is None
    assert times["sensitivity-mean"] == times["sensitivity-mean,sensitivity-worst"]
    flops = 362e12 * EFFICIENCY["gpu"]
    turn = 2 * 8 * 64 * 3 * (scale.model_size.active + 2 * 256 * 8192 * 80) * 3 / 80 / flops
    assert times["sensitivity-mean"] == pytest.approx(161 * turn, rel=0.25)  # and the first one fills the shards


def test_searched_mixtures_take_masks_and_some_of_them_evaluations() -> None:
    """Wanda at two sparsities: 30 masks for each, of which 2 mixtures are evaluated, beside the grid of 10."""
    mixture = "{searcher: optuna, parts: ['mono:en', 'mono:es'], trials: 30, evaluate: 2}"
    seconds = []
    for settings in ([], [f"search.mixture={mixture}"]):
        scale = planned("llama-3.1-70b", *settings, nodes=8)
        phases = {phase.name: phase.seconds for phase in scale.phases}
        seconds.append((phases["masks"], scale.work.variants, len(scale.work.calibration)))
    (masks, variants, sets), (more_masks, more_variants, more_sets) = seconds
    assert more_variants == variants + 2 * 2
    assert more_masks / masks == pytest.approx((variants + 2 * 2 + 2 * 30) / variants)
    assert more_sets == sets + 1, "Spanish text"


def test_offloaded_weights_bound_a_pass() -> None:
    scale = planned("qwen3-235b-a22b", nodes=1)
    assert scale.plan is not None
    assert str(scale.plan.residency) == "zero/nvme"
    calibration = next(phase for phase in scale.phases if phase.name == "calibration")
    shard = max(need.disk for need in scale.plan.memory)
    assert calibration.bound == "weights from disk"
    assert calibration.weights_moved == shard
    assert calibration.seconds == pytest.approx(4 * shard / (DISK_BYTES_PER_SECOND / 4))  # four shards in turn


def test_proposed_changes_help() -> None:
    scale = planned("bloom-176b", nodes=1, gpu_memory=24 * 10**9)
    assert scale.plan is None
    assert "zero/nvme needs" in scale.reason
    bigger = planned("llama-3.1-70b", nodes=1, gpu_memory=24 * 10**9, host_memory=64 * GIB)
    assert bigger.plan is not None
    (change,) = bigger.changes
    nodes = int(re.match(r"(\d+) nodes: resident", change).group(1))  # type: ignore[union-attr]
    enough = planned("llama-3.1-70b", nodes=nodes, gpu_memory=24 * 10**9, host_memory=64 * GIB)
    too_few = planned("llama-3.1-70b", nodes=nodes // 2, gpu_memory=24 * 10**9, host_memory=64 * GIB)
    assert enough.plan is not None
    assert too_few.plan is not None
    assert (str(enough.plan.residency), too_few.plan.residency.kind) == ("resident", "zero")
    forced = planned("bloom-176b", "pipeline.residency=resident", nodes=1)
    assert forced.plan is None
    assert any("pipeline.residency=auto: zero/cpu" in change for change in forced.changes)


# the command


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["plan", *words])


def test_a_config_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "somebody.json"
    file.write_text(json.dumps(config("llama").to_dict()))
    for model in (file, rename(file)):
        result = run(str(model), "--host-memory", "8GiB", "--json", "-")
        assert result.exit_code == 0, result.output
        values = json.loads(result.stdout)
        assert (values["fits"], values["residency"], len(values["shards"])) == (True, "resident", 1)
        assert values["machine"]["host_memory"] == 8 * GIB
        assert all(math.isfinite(phase["seconds"]) for phase in values["phases"])


def rename(file: Path) -> Path:
    folder = file.with_name("folder")
    folder.mkdir()
    (folder / "config.json").write_bytes(file.read_bytes())
    return folder


MISTAKES = {
    "--host-memory=much": "--host-memory: 'much': write a size, e.g. 80GiB",
    "--gpus-per-node=8": "--gpu-memory: missing; give the memory of one GPU",
    "--nodes=2": "--host-memory: missing; give the memory of one node",
    "--set=pipeline.shards=900": "pipeline.shards: 900: the model has 80 layers",
    "--set=pipeline.offload=tape": "pipeline.offload: 'tape': must be 'cpu' or 'nvme'",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_mistakes_are_reported(option: str) -> None:
    result = run(str(ROOT / "docs" / "models" / "llama-3.1-70b.json"), option)
    assert result.exit_code == 2
    assert MISTAKES[option] in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_not_a_config(tmp_path: Path) -> None:
    for text in ("{}", "[", '{"model_type": "t5"}'):
        (tmp_path / "x.json").write_text(text)
        result = run(str(tmp_path / "x.json"), "--host-memory", "8GiB")
        assert result.exit_code == 2
        assert result.stderr.startswith("mlprune: model.path: ")


def test_a_plan_fits_a_hundred_columns() -> None:
    machine = ["--nodes", "2", "--gpus-per-node", "4", "--gpu-memory", "48GB", "--host-memory", "384GiB"]
    for name in MODELS.values():
        result = run(str(ROOT / "docs" / "models" / f"{name}.json"), *machine)
        tables = [line for line in result.stdout.splitlines() if line.startswith(" ")]
        assert max(map(len, tables)) <= 100
        assert "…" not in result.stdout


@pytest.mark.usefixtures("ray_cluster")
def test_the_machine_of_the_running_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    machine = cluster_machine()
    assert machine is not None
    assert (machine.nodes, machine.gpus) == (1, 0)
    assert machine.host_memory > GIB
