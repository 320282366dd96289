"""Terminal output: the two consoles, log messages, progress bars, the live table, sizes and times as text.

Progress and log messages go to standard error: standard output is for results. Tables are in `report`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

WIDTH = 100  # width of tables where standard output is not a terminal
LEVELS = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}  # log level by verbosity

# no markup: messages name folders, and a folder may be called "model[v2]"
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
results = Console(highlight=False, markup=False)
if not results.is_terminal:
    results.width = WIDTH
_table_open = False  # a live table occupies the last lines of the terminal
_quiet = False  # only warnings and errors are printed: no progress


class ErrorStreamHandler(logging.Handler):
    """Prints log records on standard error: INFO as it is, WARNING in yellow, DEBUG dim with its logger's name."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                errors.print(f"{record.levelname.lower()}: {text}", style="yellow")
            elif record.levelno >= logging.INFO:
                errors.print(text)
            else:
                errors.print(f"{record.name}: {text}", style="dim")
        except Exception:
            self.handleError(record)


def configure_logging(verbosity: int = 0) -> None:
    """Print what mlprune logs on standard error: -1 is quiet (warnings only, no progress), 1 adds debug messages.

    Calling it again replaces the earlier configuration. Loggers of other libraries are left alone.
    """
    global _quiet
    _quiet = verbosity < 0
    logger = logging.getLogger("mlprune")
    logger.handlers = [ErrorStreamHandler()]
    logger.setLevel(LEVELS[verbosity])
    logger.propagate = False  # some libraries give the root logger a handler: messages would appear twice


def is_quiet() -> bool:
    """Whether progress is hidden (`--quiet`)."""
    return _quiet


@contextmanager
def live_table() -> Iterator[Callable[[RenderableType], None]]:
    """Keep one table below all other output of a terminal; yields the function that updates it.

    The table is erased at the end.
    """
    global _table_open
    _table_open = True
    try:
        # results are redirected only if they share the terminal: in a file they do not disturb the table
        with Live(console=errors, auto_refresh=False, transient=True, redirect_stdout=results.is_terminal) as live:
            try:
                yield lambda table: live.update(table, refresh=True)
            finally:
                # without this, rich prints the whole table once more, and cannot erase one higher than the screen
                live.update("", refresh=True)
    finally:
        _table_open = False


@contextmanager
def step(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for a step of work; yields `update(done, total)`, counted in `unit`.

    Below a live table and where standard error is no terminal, only a line is printed when the step is finished.
    In quiet mode nothing is printed.
    """
    started = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    hidden = _quiet or _table_open or not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=hidden) as bars:
        task = bars.add_task(text, total=None, count="")

        def update(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, count=f"{done} of {total} {unit}")

        yield update
    if not _quiet:
        errors.print(f"  {text}  {time.monotonic() - started:.1f} s", style="dim")


def size_text(count: float) -> str:
    """Format a number of bytes with a binary unit: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def time_text(seconds: float) -> str:
    """Format a duration with a suitable unit: `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
