"""The command line.

command  what all commands share
sweeps   sweep, status
models   prune, trim, calibration, evaluate, measure, plan
studies  compare, analyze
"""

from mlprune.cli import models, studies, sweeps  # noqa: F401 - commands are added to the group when they are imported
from mlprune.cli.command import main

__all__ = ["main"]
