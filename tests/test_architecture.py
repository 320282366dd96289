"""The architecture: packages import in one direction, and each library is imported where the table says."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlprune

ROOT = Path(mlprune.__file__).parent
# A package may import itself and what stands before it. errors, console and the package itself are single files.
LAYOUT = """
    mlprune errors console spec pruning storage data models planning shards runtime evaluation analysis tracking
    sweep commands remote report cli __main__
"""
ORDER = LAYOUT.split()
TOP_LEVEL_FILES = 6
# the packages that print; the others log
PRINTING = ("cli", "console", "remote", "report")
CONSOLES = ("mlprune.console.errors", "mlprune.console.results")
# library (the longest matching name counts) -> packages or modules that may import it
LIBRARIES = {
    "datasets": ("data",),
    "deepspeed": ("models.zero",),
    "filelock": ("storage", "tracking"),
    "fsspec": ("storage",),
    "gguf": ("models.demo",),
    "langcodes": ("spec.languages",),
    "lm_eval": ("evaluation.harness",),
    "matplotlib": ("analysis",),
    "mlflow": ("tracking",),
    "optuna": ("sweep.searching",),
    "ray": ("runtime",),
    "ray.autoscaler": ("runtime.nodes", "remote.ssh"),
    "ray.exceptions": ("runtime", "remote.jobs"),
    "ray.job_submission": ("remote.jobs",),
    "ray.tune": ("sweep.tune_runner",),
    "rich": ("console", "report"),
    "sacrebleu": ("evaluation",),
    "scipy": ("evaluation", "pruning.sensitivity"),
    "transformers": (
        "data",
        "models",
        "planning.model_size",
        "evaluation",
        "commands.calibration",
        "commands.checkpoint",
        "commands.measure",
        "commands.trim",
        "sweep.structures",
        "sweep.prepare",
    ),
}


def module_name(file: Path) -> str:
    """`spec.schema` for mlprune/spec/schema.py; `mlprune` for the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mlprune"


MODULES = {module_name(file): file.read_text() for file in sorted(ROOT.rglob("*.py"))}


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, inside functions too. `from a import b` is a.b, module or not."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_target(name: str) -> str | None:
    """The module of ours that an import names; None for a library."""
    first, _, rest = name.partition(".")
    if first != "mlprune":
        return None
    while rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest or "mlprune"


def package_of(module: str) -> str:
    return module.split(".")[0]


def upward_imports(module: str, text: str) -> list[str]:
    """Imports of a package that comes after the module's own."""
    place = ORDER.index(package_of(module))
    found = [(line, own_target(name)) for line, name in imports(text)]
    return [f"{module}:{line}: {target}" for line, target in found if target and _after(target, place)]


def _after(target: str, place: int) -> bool:
    return package_of(target) not in ORDER[: place + 1]


def misplaced_libraries(module: str, text: str) -> list[str]:
    found = []
    for line, name in imports(text):
        library = max((known for known in LIBRARIES if f"{name}.".startswith(f"{known}.")), key=len, default=None)
        if library and not any(f"{module}.".startswith(f"{allowed}.") for allowed in LIBRARIES[library]):
            found.append(f"{module}:{line}: {name}")
    return found


def prints(module: str, text: str) -> list[str]:
    """Calls of print, and uses of the consoles, in a package that has to log instead."""
    if package_of(module) in PRINTING:
        return []
    imported = [f"{module}:{line}: {name}" for line, name in imports(text) if name in CONSOLES]
    nodes = list(ast.walk(parsed(text)))
    calls = [
        f"{module}:{node.lineno}: print" for node in nodes if isinstance(node, ast.Name) and node.id == "print"
    ]
    uses = (node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("errors", "results"))
    return (
        imported
        + calls
        + [f"{module}:{node.lineno}" for node in uses if f"mlprune.{ast.unparse(node)}" in CONSOLES]
    )


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others: what is left after all others are taken away, one by one."""
    left = {module: set(targets) for module, targets in graph.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    return sorted(left)


def test_every_module_belongs_to_a_package_of_the_order() -> None:
    assert {package_of(module) for module in MODULES} == set(ORDER)
    assert len(list(ROOT.glob("*.py"))) <= TOP_LEVEL_FILES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert upward_imports(module, MODULES[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_imported_where_the_table_says(module: str) -> None:
    assert misplaced_libraries(module, MODULES[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_libraries_log_and_do_not_print(module: str) -> None:
    assert prints(module, MODULES[module]) == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {target for _, name in imports(text) if (target := own_target(name)) and target != module}
        for module, text in MODULES.items()
    }
    graph["mlprune"] = set()
    assert cycles(graph) == []


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) == "pruning"])
def test_pruning_needs_torch_numpy_and_scipy_alone(module: str) -> None:
    roots = {name.split(".")[0] for _, name in imports(MODULES[module])}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "scipy", "mlprune"}


def test_a_violation_would_be_found() -> None:
    """The checks above, on imports that must not pass."""
    assert upward_imports("storage.results", "from mlprune.shards import worker")
    assert upward_imports("storage.results", "def f():\n    from mlprune.shards.worker import ShardWorker")
    assert upward_imports("errors", "import mlprune.spec.languages")
    assert not upward_imports("cli", "from mlprune import __version__\nfrom mlprune.report import live")
    assert misplaced_libraries("sweep.sweep", "import ray")
    assert misplaced_libraries("sweep.sweep", "from ray.util import queue")
    assert misplaced_libraries("runtime.actors", "from ray import tune")
    assert misplaced_libraries("models.source", "import datasets.arrow_dataset")
    assert misplaced_libraries("storage.results", "import deepspeed")
    assert not misplaced_libraries("sweep.tune_runner", "from ray import tune")
    assert not misplaced_libraries("sweep.searching", "import optuna")
    assert prints("sweep.sweep", "def f(): print('a')")
    assert prints("sweep.sweep", "from mlprune.console import errors")
    assert prints("sweep.sweep", "from mlprune import console\nconsole.results.print('a')")
    assert not prints("sweep.sweep", "from mlprune.console import step\nlogger.info('print')")
    assert not prints("report.sweep", "from mlprune.console import results")
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
