"""What a person sees while work goes on: bars on a terminal, a line for each finished step elsewhere.

It all goes to the error stream: standard output is for results.
"""

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

WIDTH = 100  # of tables where there is no terminal to ask

# no markup: what is shown names folders, and a folder may be called "model[v2]"
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
results = Console(highlight=False, markup=False)
if not results.is_terminal:
    results.width = WIDTH
_table_open = False  # it has the terminal's last lines to itself


@contextmanager
def live_table() -> Iterator[Callable[[RenderableType], None]]:
    """Keep one table under what is printed meanwhile, on a terminal; yields what sets it. At the end it goes."""
    global _table_open
    _table_open = True
    try:
        # what goes to a file does not disturb the table, and belongs there
        with Live(console=errors, auto_refresh=False, transient=True, redirect_stdout=results.is_terminal) as live:
            try:
                yield lambda table: live.update(table, refresh=True)
            finally:
                live.update("", refresh=True)  # else rich shows it whole once more, which may be too high to erase
    finally:
        _table_open = False


@contextmanager
def step(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show that something is under way; yields `update(done, total)`, in `unit`s.

    Under a live table it has no bar, only its line when it is done.
    """
    started = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    hidden = _table_open or not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=hidden) as bars:
        task = bars.add_task(text, total=None, count="")

        def update(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, count=f"{done} of {total} {unit}")

        yield update
    errors.print(f"  {text}  {time.monotonic() - started:.1f} s", style="dim")


def say(text: str) -> None:
    errors.print(text)


def warn(text: str) -> None:
    errors.print(f"warning: {text}", style="yellow")


def size_text(count: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def time_text(seconds: float) -> str:
    """Seconds as a person reads them: `3 min`, `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
