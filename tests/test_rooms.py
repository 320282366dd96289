"""The house: imports go down the floors only, and each foreign library comes in by its own door."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlprune

PACKAGE = Path(mlprune.__file__).parent
# a module may import what stands before it, on its own floor or on one below
LAYOUT = """
    mlprune errors languages templates variants config specs console standing
    pruning pruning.moments pruning.masks pruning.sparsegpt pruning.scores pruning.allocation
    data data.corpora data.code data.demonstrations data.calibration data.questions
    models models.quiet models.demo models.source models.hollow models.matrices models.memory
    models.cache models.replay models.residency models.zero
    storage store
    shards shards.machine shards.shape shards.masking shards.features shards.decoding shards.gathering
    shards.likelihood shards.worker shards.memory shards.planner shards.forecast shards.pipeline
    shards.cluster shards.places shards.actors shards.fleet
    evaluation evaluation.items evaluation.significance evaluation.consistency evaluation.perplexity
    evaluation.harness_model evaluation.harness
    evaluation.choices evaluation.translation evaluation.suite analysis analysis.pictures analysis.sweep_pictures
    analysis.features analysis.feature_pictures export
    grid asked prepare trial outbox tracking_server tracking tuning watching outcome sweep winner
    scale comparison study
    head parcel remote report report.tables report.ranking report.sweep report.page report.live
    report.scale report.comparison report.study cli __main__
"""
FLOORS = LAYOUT.split()
ORDER = {name if name == "mlprune" else f"mlprune.{name}": place for place, name in enumerate(FLOORS)}
RAY = ("mlprune.shards.cluster", "mlprune.shards.places", "mlprune.shards.actors", "mlprune.shards.fleet")
# a foreign library (the longest name that matches counts) -> the modules that may import it
DOORS = {
    "datasets": ("mlprune.data.",),
    "ray.job_submission": ("mlprune.remote",),
    "ray.autoscaler": ("mlprune.head", "mlprune.shards.cluster"),
    "ray.exceptions": ("mlprune.remote", *RAY),
    "ray": RAY,
    "ray.tune": ("mlprune.tuning",),
    "mlflow": ("mlprune.tracking_server", "mlprune.tracking"),
    "optuna": ("mlprune.tuning",),
    "deepspeed": ("mlprune.models.zero",),
    "matplotlib": ("mlprune.analysis.",),
    "gguf": ("mlprune.models.",),
    "langcodes": ("mlprune.languages",),
    "scipy": ("mlprune.evaluation.significance",),
    "sacrebleu": ("mlprune.evaluation.",),
    "lm_eval": ("mlprune.evaluation.harness", "mlprune.evaluation.harness_model"),
}


def name_of(file: Path, package: Path = PACKAGE) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything imported, wherever it stands. `from a import b` is a.b, module or not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def climbs(module: str, text: str) -> list[str]:
    """Imports from the package that do not go down."""
    found = []
    for line, name in imported(text):
        if name.split(".")[0] == "mlprune":
            target = name if name in ORDER else name.rpartition(".")[0]
            if target not in ORDER or ORDER[target] >= ORDER[module]:
                found.append(f"{module}:{line} imports {target}")
    return found


def trespasses(module: str, text: str) -> list[str]:
    """Imports of foreign libraries that have their door elsewhere."""
    found = []
    for line, name in imported(text):
        library = max((door for door in DOORS if f"{name}.".startswith(f"{door}.")), key=len, default=None)
        if library and not any(
            module == door or (door.endswith(".") and module.startswith(door)) for door in DOORS[library]
        ):
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ORDER)
    assert len(ORDER) == len(FLOORS), "each once"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert climbs(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_libraries_come_in_by_their_doors(module: str) -> None:
    assert trespasses(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("mlprune.pruning")])
def test_the_arithmetic_needs_torch_and_numpy_alone(module: str) -> None:
    roots = {name.split(".")[0] for _, name in imported(MODULES[module].read_text())}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "mlprune"}


def test_a_breach_would_be_seen() -> None:
    """The checks above on imports that must not pass."""
    assert climbs("mlprune.store", "from mlprune.shards import worker")
    assert climbs("mlprune.store", "def f():\n    from mlprune.shards.worker import Recipe")
    assert climbs("mlprune.pruning.moments", "from mlprune.pruning.masks import keep_mask")
    assert climbs("mlprune.errors", "import mlprune.languages")
    assert climbs("mlprune.store", "from mlprune.store import Result")
    assert climbs("mlprune.cli", "from mlprune.nowhere import x")
    assert not climbs("mlprune.cli", "from mlprune import report, __version__")
    assert trespasses("mlprune.sweep", "import ray")
    assert trespasses("mlprune.sweep", "from ray.util import queue")
    assert trespasses("mlprune.shards.actors", "from ray import tune")
    assert trespasses("mlprune.models.source", "import datasets.arrow_dataset")
    assert trespasses("mlprune.store", "import deepspeed")
    assert not trespasses("mlprune.tuning", "from ray import tune")
    assert not trespasses("mlprune.tuning", "from ray.tune.search.optuna import OptunaSearch")
