"""Logging in worker and trial processes: to standard error, which Ray writes to its log files.

The level is in the environment variable MLPRUNE_LOG_LEVEL, which the driver passes to the workers. Logging in the
driver is set up by `mlprune.console`.
"""

from __future__ import annotations

import logging
import os

from mlprune.errors import SpecError

LEVEL_VARIABLE = "MLPRUNE_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def worker_log_level() -> str:
    """Return the level of workers. Raises SpecError when the variable holds no level."""
    level = os.environ.get(LEVEL_VARIABLE, "WARNING")
    if level.upper() not in LEVELS:
        raise SpecError(LEVEL_VARIABLE, repr(level), f"choose one of {', '.join(LEVELS)}")
    return level.upper()


def configure_worker_logging() -> None:
    """Set the level of the logger `mlprune` in this process, and write its messages to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("mlprune")
    logger.handlers = [handler]
    logger.setLevel(worker_log_level())
    logger.propagate = False
