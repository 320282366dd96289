"""Displays the status of running sweeps: one live table on a terminal, plain lines elsewhere.

The status itself is collected in `sweep.monitor`. Nothing heavy is imported here: `mlprune status` must be fast.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlprune import console
from mlprune.console import time_text
from mlprune.sweep.status import RunningSweep, ShardStatus, SweepStatus, seconds_since_update

# most rows of each kind, so that the whole table fits a terminal of 24 lines
MOST = {"trials": 6, "shards": 8, "replicas": 4, "notes": 3, "lost": 2}
BAR = 16  # width of the bar of a shard's occupancy
BLOCKS = "▁▂▃▄▅▆▇█"
SECONDS_BETWEEN = 30  # between plain lines while nothing changes
STALE = 10  # seconds without an update from a driver that updates its status each second

Row = tuple[str | Text | ProgressBar, ...]


def render(status: SweepStatus, width: int) -> RenderableType:
    """Return counts, notes, active trials and shards, in lines of at most `width` cells.

    Long lists of trials or shards are summarised; a long note takes two lines.
    """
    times = [f"{time_text(max(status.now - status.started, 0))} so far", *_left(status)]
    title = ", ".join([f"{status.name}: {status.phase}", *times])
    notes = [_shortened(f"note: {note}", 2 * width) for note in status.notes]
    parts: list[RenderableType] = [
        Text(_shortened(title, width), style="bold"),
        _wrapped(", ".join(_counts(status))),
    ]
    parts += [_wrapped(note, style="yellow") for note in _some(notes, MOST["notes"], "notes")]
    if status.trials:
        parts.append(_trials(status, width))
    if status.shards:
        few = len(status.shards) <= MOST["shards"]
        parts.append(_each_shard(status.shards, width) if few else _many_shards(status.shards, width))
    return Group(*parts)


def _counts(status: SweepStatus) -> list[str]:
    """Return the progress of the sweep as phrases."""
    alive = [shard for shard in status.shards if shard.alive]
    lost = len(status.shards) - len(alive)
    counts = [f"{status.finished} of {status.total} trials"]
    counts += [f"{status.failed} failed"] * bool(status.failed)
    counts += [f"{len(status.trials)} active"] * bool(status.trials)
    if alive:
        counts.append(f"{_throughput(status.shards):,.0f} tokens/s")
        counts.append(f"shard{'s' * (len(alive) > 1)} {_mean_busy(alive):.0%} busy")
    counts += [f"{lost} shard{'s' * (lost > 1)} lost"] * bool(lost)
    return counts


def _left(status: SweepStatus) -> list[str]:
    return [] if status.seconds_left is None else [f"about {time_text(status.seconds_left)} left"]


def _throughput(shards: Sequence[ShardStatus]) -> float:
    """Return tokens per second through the whole model: every token passes each shard of a replica."""
    by_replica = _by_replica(shards).values()
    return sum(sum(shard.tokens for shard in group) / len(group) for group in by_replica)


def _by_replica(shards: Sequence[ShardStatus]) -> dict[int, list[ShardStatus]]:
    ordered = sorted(shards, key=lambda shard: (shard.replica, shard.shard))
    return {replica: list(group) for replica, group in groupby(ordered, key=lambda shard: shard.replica)}


def _mean_busy(shards: Sequence[ShardStatus]) -> float:
    return sum(shard.busy for shard in shards) / len(shards)


def _trials(status: SweepStatus, width: int) -> RenderableType:
    displayed, more = status.trials[: MOST["trials"]], status.trials[MOST["trials"] :]
    rows: list[Row] = [(trial.label, _shortened(trial.phase, 24), time_text(trial.seconds)) for trial in displayed]
    table = _table(["trial", "phase", ">time"], rows, width)
    if not more:
        return table
    phases = ", ".join(f"{count} {phase}" for phase, count in Counter(trial.phase for trial in more).most_common())
    return Group(table, Text(_shortened(f"... and {len(more)} more: {phases}", width), style="dim"))


def _each_shard(shards: Sequence[ShardStatus], width: int) -> Table:
    several = len(_by_replica(shards)) > 1
    rows: list[Row] = []
    for shard in shards:
        layers = "{}-{}".format(*shard.layers)
        first = (*[str(shard.replica)] * several, str(shard.shard), layers, _shortened(shard.node, 20))
        if shard.alive:
            bar = ProgressBar(total=1, completed=shard.busy, width=BAR)
            rows.append((*first, bar, f"{shard.busy:.0%}", f"{shard.tokens:,.0f}"))
        else:
            rows.append((*first, Text("lost", style="red"), "", ""))
    return _table([*["replica"] * several, "shard", "layers", "node", "busy", ">", ">tokens/s"], rows, width)


def _many_shards(shards: Sequence[ShardStatus], width: int) -> RenderableType:
    """Return one row of blocks per replica and the busiest and least busy shard.

    A block is one shard, or several neighbours if the row would be too wide.
    """
    replicas = _by_replica(shards)
    several = len(replicas) > 1
    displayed = list(replicas.items())[: MOST["replicas"]]
    cells = width - len("replica  ") * several - len("  100%  ")
    rows: list[Row] = [
        (*[str(number)] * several, _blocks(group, cells), _busy(group)) for number, group in displayed
    ]
    parts: list[RenderableType] = [_table([*["replica"] * several, "occupancy of each shard", ">"], rows, width)]
    if rest := [shard for group in list(replicas.values())[len(displayed) :] for shard in group]:
        parts.append(Text(f"... and {len(replicas) - len(displayed)} more replicas: {_busy(rest)}", style="dim"))
    if alive := sorted((shard for shard in shards if shard.alive), key=lambda shard: shard.busy):
        extremes = (("busiest", alive[-1]), ("least busy", alive[0]))
        parts += [
            Text(_shortened(f"{word}: {_named(shard)}, {shard.busy:.0%}", width)) for word, shard in extremes
        ]
    lost = [_shortened(f"lost: {_named(shard)}", width) for shard in shards if not shard.alive]
    parts += [Text(line, style="red") for line in _some(lost, MOST["lost"], "lost")]
    return Group(*parts)


def _blocks(shards: Sequence[ShardStatus], cells: int) -> Text:
    together = math.ceil(len(shards) / cells)
    text = Text()
    for start in range(0, len(shards), together):
        group = shards[start : start + together]
        if all(shard.alive for shard in group):
            text.append(BLOCKS[min(int(_mean_busy(group) * len(BLOCKS)), len(BLOCKS) - 1)])
        else:
            text.append("x", style="red")
    return text


def _busy(shards: Sequence[ShardStatus]) -> str:
    alive = [shard for shard in shards if shard.alive]
    return f"{_mean_busy(alive):.0%}" if alive else ""


def _named(shard: ShardStatus) -> str:
    layers = "layers {}-{}".format(*shard.layers)
    return f"shard {shard.shard} of replica {shard.replica} ({layers}, {shard.node})"


def _table(head: Sequence[str], rows: Sequence[Row], width: int) -> Table:
    """Return a table with rows of one line each; if they are too wide, the first column's text loses its middle.

    A column whose name begins with > is right-aligned.
    """
    names = [name.removeprefix(">") for name in head]
    others = list(zip(names, *rows, strict=True))[1:]
    cells = width - sum(2 + max(map(_cells, column)) for column in others)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name, title in zip(head, names, strict=True):
        table.add_column(title, justify="right" if name != title else "left", no_wrap=True, overflow="ellipsis")
    for first, *rest in rows:
        short = _shortened(first, max(cells, 12)) if isinstance(first, str) else first
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (short, *rest)))
    return table


def _cells(cell: str | Text | ProgressBar) -> int:
    if isinstance(cell, ProgressBar):
        return BAR
    return cell_len(cell if isinstance(cell, str) else cell.plain)


def _wrapped(text: str, style: str = "") -> Text:
    """Return text that wraps between words, also on a console that does not wrap."""
    return Text(text, style=style, no_wrap=False, overflow="fold")


def _some(lines: Sequence[str], most: int, kind: str) -> list[str]:
    more = [f"... and {len(lines) - most} more {kind}"] if len(lines) > most else []
    return [*lines[:most], *more]


def _shortened(text: str, cells: int) -> str:
    """Return the text in at most `cells` cells; long text loses its middle, because labels differ at both ends."""
    text = _clean(text)
    if cell_len(text) <= cells:
        return text
    tail = (cells - 3) // 2
    return set_cell_size(text, cells - 3 - tail) + "..." + set_cell_size(text[::-1], tail)[::-1]


def _clean(text: str) -> str:
    """Replace line breaks and control characters by spaces: notes quote messages of other programs."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class PlainLines:
    """Selects lines to print where no table can be drawn: changes at once, the counts every 30 seconds.

    Changes are a new phase, a finished or failed trial, and a note that appears or disappears. Notes that only
    differ in their numbers are the same note.
    """

    def __init__(self) -> None:
        self._last: SweepStatus | None = None
        self._printed = -math.inf

    def lines(self, status: SweepStatus) -> list[str]:
        """Return the lines to print now, by the clock of the status; usually none."""
        last, self._last = self._last, status
        before, now = _by_kind(last.notes if last else ()), _by_kind(status.notes)
        lines = [f"note: {note}" for kind, note in now.items() if kind not in before]
        lines += [f"resolved: {note}" for kind, note in before.items() if kind not in now]
        counts = ", ".join([*_counts(status), *_left(status)])
        quiet = not lines and status.now - self._printed >= SECONDS_BETWEEN
        if last is None or last.phase != status.phase:
            lines.append(f"{status.name}, {status.phase}: {counts}")
        elif quiet or (last.finished, last.failed) != (status.finished, status.failed):
            lines.append(counts)
        if lines:
            self._printed = status.now
        return [_clean(line) for line in lines]


def _by_kind(notes: Sequence[str]) -> dict[str, str]:
    """Return the notes by their text without numbers."""
    return {re.sub(r"\d[\d.,]*", "0", note): note for note in notes}


@contextmanager
def live_view() -> Iterator[Callable[[SweepStatus], None]]:
    """Yield a function that displays a status; call it about once a second. Nothing is displayed in quiet mode."""
    if console.is_quiet():
        yield lambda status: None
    elif console.errors.is_interactive:
        with console.live_table() as put:
            yield lambda status: put(render(status, console.errors.width))
    else:
        yield _print_lines(PlainLines())


def _print_lines(plain: PlainLines) -> Callable[[SweepStatus], None]:
    def show(status: SweepStatus) -> None:
        for line in plain.lines(status):
            console.errors.print(f"  {line}")

    return show


def show_running(sweeps: Sequence[RunningSweep]) -> None:
    """Print the sweeps of this machine for `mlprune status`."""
    if not sweeps:
        console.results.print("no sweep runs on this machine")
    for sweep in sweeps:
        status, silent = sweep.status, seconds_since_update(sweep.status)
        if silent > STALE:
            note = f"process {sweep.pid} has not updated its status for {time_text(silent)}; it may be outdated"
            status = replace(status, notes=(note, *status.notes))
        status = replace(status, name=f"process {sweep.pid}, {status.name}")
        console.results.print(render(status, console.results.width))


def running_values(sweeps: Sequence[RunningSweep]) -> dict[str, object]:
    """Return the sweeps of this machine as plain values."""
    return {"sweeps": [{"pid": sweep.pid, **asdict(sweep.status)} for sweep in sweeps]}
