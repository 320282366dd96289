"""How a sweep stands, for a person who watches: one live table on a terminal, plain lines elsewhere.

Nothing heavy is imported here, so that `mlprune status` answers at once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlprune import console
from mlprune.console import time_text
from mlprune.sweep.status import RunningSweep, ShardStatus, SweepStatus, seconds_since_update

# of each kind, so that all stands in a terminal of 24 lines
MOST = {"trials": 6, "shards": 8, "replicas": 4, "notes": 3, "gone": 2}
BAR = 16  # cells of a shard's occupancy
BLOCKS = "▁▂▃▄▅▆▇█"
SECONDS_BETWEEN = 30  # plain lines of which none tells news
STALE = 10  # seconds without a word from a driver that speaks each second

Row = tuple[str | Text | ProgressBar, ...]


def render(status: SweepStatus, width: int) -> RenderableType:
    """The whole in lines of at most `width` cells: counts, notes, trials under way, shards.

    Many trials or shards are summed up; a long note takes two lines.
    """
    times = [f"{time_text(max(status.now - status.started, 0))} so far", *_left(status)]
    title = ", ".join([f"{status.name}: {status.phase}", *times])
    notes = [_shortened(f"note: {note}", 2 * width) for note in status.notes]
    parts: list[RenderableType] = [
        Text(_shortened(title, width), style="bold"),
        _words(", ".join(_told(status))),
    ]
    parts += [_words(note, style="yellow") for note in _some(notes, MOST["notes"], "notes")]
    if status.trials:
        parts.append(_trials(status, width))
    if status.shards:
        few = len(status.shards) <= MOST["shards"]
        parts.append(_each_shard(status.shards, width) if few else _many_shards(status.shards, width))
    return Group(*parts)


def _told(status: SweepStatus) -> list[str]:
    """How far it is, in phrases."""
    alive = [shard for shard in status.shards if shard.alive]
    gone = len(status.shards) - len(alive)
    told = [f"{status.finished} of {status.total} trials"]
    told += [f"{status.failed} failed"] * bool(status.failed)
    told += [f"{len(status.trials)} under way"] * bool(status.trials)
    if alive:
        told.append(f"{_throughput(status.shards):,.0f} tokens/s")
        told.append(f"shard{'s' * (len(alive) > 1)} {_mean_busy(alive):.0%} busy")
    told += [f"{gone} shard{'s' * (gone > 1)} gone"] * bool(gone)
    return told


def _left(status: SweepStatus) -> list[str]:
    return [] if status.seconds_left is None else [f"about {time_text(status.seconds_left)} left"]


def _throughput(shards: Sequence[ShardStatus]) -> float:
    """Tokens a second through the whole model: every token passes each shard of a replica."""
    by_replica = _by_replica(shards).values()
    return sum(sum(shard.tokens for shard in group) / len(group) for group in by_replica)


def _by_replica(shards: Sequence[ShardStatus]) -> dict[int, list[ShardStatus]]:
    ordered = sorted(shards, key=lambda shard: (shard.replica, shard.shard))
    return {replica: list(group) for replica, group in groupby(ordered, key=lambda shard: shard.replica)}


def _mean_busy(shards: Sequence[ShardStatus]) -> float:
    return sum(shard.busy for shard in shards) / len(shards)


def _trials(status: SweepStatus, width: int) -> RenderableType:
    shown, more = status.trials[: MOST["trials"]], status.trials[MOST["trials"] :]
    rows: list[Row] = [(trial.label, _shortened(trial.phase, 24), time_text(trial.seconds)) for trial in shown]
    table = _table(["trial", "phase", ">time"], rows, width)
    if not more:
        return table
    phases = ", ".join(f"{count} {phase}" for phase, count in Counter(trial.phase for trial in more).most_common())
    return Group(table, Text(_shortened(f"... and {len(more)} more: {phases}", width), style="dim"))


def _each_shard(shards: Sequence[ShardStatus], width: int) -> Table:
    several = len(_by_replica(shards)) > 1
    rows: list[Row] = []
    for shard in shards:
        place = "{}-{}".format(*shard.layers)
        first = (*[str(shard.replica)] * several, str(shard.shard), place, _shortened(shard.node, 20))
        if shard.alive:
            bar = ProgressBar(total=1, completed=shard.busy, width=BAR)
            rows.append((*first, bar, f"{shard.busy:.0%}", f"{shard.tokens:,.0f}"))
        else:
            rows.append((*first, Text("gone", style="red"), "", ""))
    return _table([*["replica"] * several, "shard", "layers", "node", "busy", ">", ">tokens/s"], rows, width)


def _many_shards(shards: Sequence[ShardStatus], width: int) -> RenderableType:
    """A small block for each shard (for several neighbours where there is no room), a row a replica; extremes."""
    replicas = _by_replica(shards)
    several = len(replicas) > 1
    shown = list(replicas.items())[: MOST["replicas"]]
    room = width - len("replica  ") * several - len("  100%  ")
    rows: list[Row] = [(*[str(number)] * several, _blocks(group, room), _busy(group)) for number, group in shown]
    parts: list[RenderableType] = [_table([*["replica"] * several, "how busy each shard is", ">"], rows, width)]
    if rest := [shard for group in list(replicas.values())[len(shown) :] for shard in group]:
        parts.append(Text(f"... and {len(replicas) - len(shown)} more replicas: {_busy(rest)}", style="dim"))
    if alive := sorted((shard for shard in shards if shard.alive), key=lambda shard: shard.busy):
        extremes = (("busiest", alive[-1]), ("idlest", alive[0]))
        parts += [Text(_shortened(f"{word}: {_named(one)}, {one.busy:.0%}", width)) for word, one in extremes]
    gone = [_shortened(f"gone: {_named(shard)}", width) for shard in shards if not shard.alive]
    parts += [Text(line, style="red") for line in _some(gone, MOST["gone"], "gone")]
    return Group(*parts)


def _blocks(shards: Sequence[ShardStatus], room: int) -> Text:
    together = math.ceil(len(shards) / room)
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
    place = "layers {}-{}".format(*shard.layers)
    return f"shard {shard.shard} of replica {shard.replica} ({place}, {shard.node})"


def _table(head: Sequence[str], rows: Sequence[Row], width: int) -> Table:
    """Rows of one line each; where they are too wide, text in the first column loses its middle.

    A column whose name begins with > is set to the right.
    """
    names = [name.removeprefix(">") for name in head]
    others = list(zip(names, *rows, strict=True))[1:]
    room = width - sum(2 + max(map(_cells, column)) for column in others)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name, shown in zip(head, names, strict=True):
        table.add_column(shown, justify="right" if name != shown else "left", no_wrap=True, overflow="ellipsis")
    for first, *rest in rows:
        short = _shortened(first, max(room, 12)) if isinstance(first, str) else first
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (short, *rest)))
    return table


def _cells(cell: str | Text | ProgressBar) -> int:
    if isinstance(cell, ProgressBar):
        return BAR
    return cell_len(cell if isinstance(cell, str) else cell.plain)


def _words(text: str, style: str = "") -> Text:
    """Text that is broken between words, whatever its console does with long lines."""
    return Text(text, style=style, no_wrap=False, overflow="fold")


def _some(lines: Sequence[str], most: int, things: str) -> list[str]:
    more = [f"... and {len(lines) - most} more {things}"] if len(lines) > most else []
    return [*lines[:most], *more]


def _shortened(text: str, room: int) -> str:
    """The text on one line of `room` cells; longer text loses its middle, for labels differ at both ends."""
    text = _clean(text)
    if cell_len(text) <= room:
        return text
    tail = (room - 3) // 2
    return set_cell_size(text, room - 3 - tail) + "..." + set_cell_size(text[::-1], tail)[::-1]


def _clean(text: str) -> str:
    """Without line breaks, and without what would command the terminal: notes quote what others said."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class PlainLines:
    """What to tell of standings that come each second where nothing can be drawn over: news, or a word at times.

    News is another phase, a trial that ended, a note that came or went. A note is the same while only its figures
    change.
    """

    def __init__(self) -> None:
        self._last: SweepStatus | None = None
        self._spoke = -math.inf

    def lines(self, status: SweepStatus) -> list[str]:
        """What is to be told now, by the status's own clock; mostly nothing."""
        last, self._last = self._last, status
        before, now = _by_kind(last.notes if last else ()), _by_kind(status.notes)
        lines = [f"note: {note}" for kind, note in now.items() if kind not in before]
        lines += [f"over: {note}" for kind, note in before.items() if kind not in now]
        told = ", ".join([*_told(status), *_left(status)])
        quiet = not lines and status.now - self._spoke >= SECONDS_BETWEEN
        if last is None or last.phase != status.phase:
            lines.append(f"{status.name}, {status.phase}: {told}")
        elif quiet or (last.finished, last.failed) != (status.finished, status.failed):
            lines.append(told)
        if lines:
            self._spoke = status.now
        return [_clean(line) for line in lines]


def _by_kind(notes: Sequence[str]) -> dict[str, str]:
    return {re.sub(r"\d[\d.,]*", "0", note): note for note in notes}


@contextmanager
def live_view() -> Iterator[Callable[[SweepStatus], None]]:
    """While the block runs, `show(status)` shows how a sweep stands; to be called each second or so."""
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


def show_running(found: Sequence[RunningSweep]) -> None:
    """What `mlprune status` prints."""
    if not found:
        console.results.print("no sweep runs on this machine")
    for one in found:
        status, silent = one.status, seconds_since_update(one.status)
        if silent > STALE:
            note = f"process {one.pid} has told nothing for {time_text(silent)}: what follows is that old"
            status = replace(status, notes=(note, *status.notes))
        status = replace(status, name=f"process {one.pid}, {status.name}")
        console.results.print(render(status, console.results.width))


def running_values(found: Sequence[RunningSweep]) -> dict[str, Any]:
    """The same as plain values."""
    return {"sweeps": [{"pid": one.pid, **asdict(one.status)} for one in found]}
