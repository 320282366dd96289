"""What a person sees while work goes on: bars on a terminal, a line for each finished step elsewhere.

It all goes to the error stream: standard output is for results.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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


@contextmanager
def step(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show that something is under way; yields `update(done, total)`, in `unit`s."""
    started = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
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
