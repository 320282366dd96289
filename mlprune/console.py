"""What a person sees while work goes on: bars on a terminal, a line for each finished step elsewhere.

It all goes to the error stream: standard output is for results.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

WIDTH = 100  # of tables where there is no terminal to ask

errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)
if not results.is_terminal:
    results.width = WIDTH


@contextmanager
def step(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Show that something is under way; yields `update(done, total)`."""
    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TextColumn(unit),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
    errors.print(f"  {text}  [dim]{time.monotonic() - started:.1f} s[/dim]")


def say(text: str) -> None:
    errors.print(text)


def warn(text: str) -> None:
    errors.print(f"[yellow]warning:[/yellow] {text}")
