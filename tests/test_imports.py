"""Importing mlprune leaves the process as it is."""

import os
import subprocess
import sys

from tests.test_architecture import MODULES, ROOT

IMPORT_ALL = """
import importlib, os, sys

before = dict(os.environ)
for module in sys.argv[1:]:
    importlib.import_module(module)
changed = sorted(name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name))
print(*changed, *(library for library in ("deepspeed", "mlflow") if library in sys.modules))
"""
# variables that libraries set when they are imported: Ray, torch (imported by transformers) and lm_eval
SET_BY_LIBRARIES = {"RAY_CLIENT_MODE", "TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE"}


def test_imports_change_no_environment_variable() -> None:
    """Nor import MLflow or DeepSpeed, which read the environment when they are imported."""
    names = [f"mlprune.{module}".removesuffix(".mlprune") for module in MODULES if module != "__main__"]
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_LIBRARIES}
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT.parent, env=environment, check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) <= SET_BY_LIBRARIES
