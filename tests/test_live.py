"""The status of a running sweep: live table, plain lines, the file of `mlprune status`, time left, bottleneck."""

import heapq
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

from mlprune import console
from mlprune.cli import main
from mlprune.report.live import BLOCKS, PlainLines, live_view, render
from mlprune.sweep import status as status_module
from mlprune.sweep.status import (
    ShardStatus,
    SweepStatus,
    TrialStatus,
    describe_bottleneck,
    remove_status,
    running_sweeps,
    seconds_left,
    write_status,
)

LONG = "contrastive:mix:code=0.2,mono:en=0.3,translation:en-de=0.5/mono:fr 2:4 owl sequential"
PHASES = ("masking", "evaluating", "again (2nd attempt)")


SIZES = ((1, 1), (1, 2), (2, 4), (1, 9), (1, 64), (4, 16), (32, 2), (8, 64))


def a_trial(number: int, label: str = "wanda 0.5 mono:fr") -> TrialStatus:
    return TrialStatus(f"{label} {number}", PHASES[number % 3], 7.0 * number)


def a_shard(replica: int, shard: int, busy: float = 0.5, alive: bool = True) -> ShardStatus:
    return ShardStatus(replica, shard, (10 * shard, 10 * shard + 9), f"10.0.{replica}.{shard}", busy, 100.0, alive)


def a_status(trials: int = 3, replicas: int = 1, shards: int = 2, label: str = "wanda 0.5 mono:fr") -> SweepStatus:
    return SweepStatus(
        name="quickstart",
        phase="trials",
        started=1000.0,
        now=1300.0,
        finished=12,
        total=40,
        failed=1,
        trials=tuple(a_trial(number, label) for number in range(trials)),
        shards=tuple(a_shard(replica, shard) for replica in range(replicas) for shard in range(shards)),
        seconds_left=840.0,
        notes=("12 updates queued for MLflow: connection refused",),
    )


def rendered(shown: SweepStatus, width: int) -> list[str]:
    """Its lines, on a console that would let long lines run on, as the one for errors does."""
    paper = Console(width=width, record=True, soft_wrap=True, file=StringIO())
    paper.print(render(shown, width))
    return paper.export_text().splitlines()


# the table


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("label", ["wanda 0.5 mono:fr", LONG])
@pytest.mark.parametrize(("replicas", "shards"), SIZES)
@pytest.mark.parametrize("trials", [1, 6, 32])
def test_a_table_fits_its_terminal(trials: int, replicas: int, shards: int, label: str, width: int) -> None:
    shown = a_status(trials, replicas, shards, label)
    lines = rendered(shown, width)
    text = "\n".join(lines)
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 24
    assert "12 of 40 trials, 1 failed" in text
    assert f"{trials} active" in text
    assert "about 14 min left" in text
    assert "note: 12 updates queued for MLflow: connection refused" in text
    assert f"{100 * replicas:,} tokens/s" in text  # each token passes all shards of its replica
    assert re.search(r"shards? 50% busy", text)
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith("trial  "))
    for trial, row in zip(shown.trials[:6], lines[first:], strict=False):
        shown_label = row.split("  ")[0]
        cuts = [found.start() for found in re.finditer(r"(?=\.\.\.)", shown_label)]  # a label has dots of its own
        kept = any(
            trial.label.startswith(shown_label[:n]) and trial.label.endswith(shown_label[n + 3 :]) for n in cuts
        )
        assert kept if cuts else trial.label == shown_label
        assert len(shown_label) >= min(30, len(trial.label))
        assert f"  {trial.phase} " in row
    assert ("more: " in text) == (trials == 32)
    assert (f"... and {replicas - 4} more replicas: 50%" in text) == (replicas > 4)
    blocks = [line.split()[-2] for line in lines if re.search(rf"[{BLOCKS}] +50%$", line)]
    cells = 32 if (replicas, shards, width) == (8, 64, 80) else shards  # two shards a block where room is short
    assert blocks == [BLOCKS[4] * cells] * (min(replicas, 4) if replicas * shards > 8 else 0)
    if trials == 32:
        assert "... and 26 more: 9 masking, 9 evaluating, 8 again (2nd attempt)" in text


def test_a_trial_and_its_figures_stand_in_one_row() -> None:
    lines = rendered(replace(a_status(2), trials=(TrialStatus("wanda 0.5 code", "masking", 75),)), 80)
    row = next(line for line in lines if line.startswith("wanda"))
    assert re.split(r"\s{2,}", row.strip()) == ["wanda 0.5 code", "masking", "75 s"]


def test_a_label_too_long_keeps_both_ends() -> None:
    row = next(line for line in rendered(a_status(1, label=LONG), 80) if line.startswith("contrastive"))
    label = row.partition("  masking")[0]
    assert re.fullmatch(r"contrastive:\S+\.\.\..+owl sequential 0", label)


def test_few_shards_have_a_row_each() -> None:
    shards = (a_shard(0, 0, busy=0.25), a_shard(0, 1, busy=1.0), replace(a_shard(0, 2), alive=False))
    lines = rendered(replace(a_status(), shards=shards), 80)
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r"\d  ", line)]
    assert [row[:3] for row in rows] == [[str(n), f"{10 * n}-{10 * n + 9}", f"10.0.0.{n}"] for n in range(3)]
    assert rows[0][-2:] == ["25%", "100"]
    assert rows[1][-2:] == ["100%", "100"]
    assert rows[1][3].count("━") == 4 * rows[0][3].count("━") > 0
    assert rows[2][-1] == "lost"
    assert "shards 62% busy, 1 shard lost" in " ".join(" ".join(lines).split())  # what is gone is not idle


@pytest.mark.parametrize("width", [80, 100])
def test_many_shards_are_a_block_each(width: int) -> None:
    fresh = random.Random()
    shares = [fresh.uniform(0.1, 0.9) for _ in range(64)]
    shares[17], shares[40] = 1.0, 0.0
    shards = [a_shard(0, number, busy=share) for number, share in enumerate(shares)]
    shards[3] = replace(shards[3], alive=False)
    lines = rendered(replace(a_status(), shards=tuple(shards)), width)
    blocks = [min(int(8 * share), 7) for share in shares]
    expected = "".join("x" if number == 3 else BLOCKS[block] for number, block in enumerate(blocks))
    mean = sum(share for number, share in enumerate(shares) if number != 3) / 63
    assert any(line.split() == [expected, f"{mean:.0%}"] for line in lines)
    assert "busiest: shard 17 of replica 0 (layers 170-179, 10.0.0.17), 100%" in lines
    assert "least busy: shard 40 of replica 0 (layers 400-409, 10.0.0.40), 0%" in lines
    assert "lost: shard 3 of replica 0 (layers 30-39, 10.0.0.3)" in lines


def test_nothing_yet_is_shown_too() -> None:
    early = SweepStatus("quickstart", "loading the model", 1000.0, 1000.0, 0, 40, 0, (), (), None, ())
    assert rendered(early, 80) == ["quickstart: loading the model, 0 s so far", "0 of 40 trials"]
    dead = replace(a_status(), shards=(replace(a_shard(0, 0), alive=False),))
    assert "tokens/s," not in "\n".join(rendered(dead, 80))


def test_notes_wrap_between_words_and_command_nothing() -> None:
    notes = ("waiting " * 14 + "for\n2 GPUs\x1b[2J", *(f"note number {number}" for number in range(4)))
    shown = replace(a_status(), notes=notes)
    lines = rendered(shown, 80)
    assert max(map(cell_len, lines)) <= 80
    assert lines[2].split() == ["note:"] + ["waiting"] * (len(lines[2].split()) - 1)
    assert re.match(r"waiting .* 2 GPUs", lines[3])
    assert "... and 2 more notes" in lines
    assert "\x1b" not in "".join([*lines, *PlainLines().lines(shown)])


# plain lines


def test_plain_lines_tell_news_at_once_and_else_seldom() -> None:
    plain = PlainLines()
    at = replace(a_status(), notes=(), now=0.0, finished=0, failed=0, seconds_left=None)
    counts = "3 active, 100 tokens/s, shards 50% busy"

    def new_lines(**changes: object) -> list[str]:
        nonlocal at
        at = replace(at, now=at.now + 1, **changes)  # type: ignore[arg-type]
        return plain.lines(at)

    assert new_lines() == [f"quickstart, trials: 0 of 40 trials, {counts}"]
    quiet = [new_lines() for _ in range(65)]  # a second each
    assert [second for second, lines in enumerate(quiet, start=1) if lines] == [30, 60]
    assert quiet[29] == [f"0 of 40 trials, {counts}"]
    assert new_lines(finished=1, seconds_left=840.0) == [f"1 of 40 trials, {counts}, about 14 min left"]
    assert new_lines(failed=1) == [f"1 of 40 trials, 1 failed, {counts}, about 14 min left"]
    assert new_lines(trials=at.trials[:2], shards=(a_shard(0, 0, busy=0.9),)) == []  # these change all the time
    waits = "{} updates queued for MLflow: connection refused"
    assert new_lines(notes=(waits.format(1),)) == ["note: 1 updates queued for MLflow: connection refused"]
    assert [new_lines(notes=(waits.format(number),)) for number in (2, 13, "1,400", 1)] == [[]] * 4
    assert new_lines(notes=(waits.format(3), "waiting for 2 GPUs")) == ["note: waiting for 2 GPUs"]
    assert new_lines(notes=("waiting for 2 GPUs",)) == [
        "resolved: 3 updates queued for MLflow: connection refused"
    ]
    assert [len(new_lines()) for _ in range(30)] == [0] * 29 + [1]  # from the last line on, whatever it printed
    assert new_lines(phase="ending", notes=())[0] == "resolved: waiting for 2 GPUs"
    assert new_lines(phase="done")[0].startswith("quickstart, done: 1 of 40 trials")


def test_without_a_terminal_lines_go_to_the_error_stream(capfd: pytest.CaptureFixture[str]) -> None:
    with live_view() as show:
        show(a_status())
        show(a_status())
        with console.step("moving a shard"):
            pass
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert [line.split()[0] for line in err.splitlines()] == ["note:", "quickstart,", "moving"]


# on a terminal


def screen(stream: str, height: int = 24) -> list[str]:
    """What a terminal shows of the stream: text, line ends, and the few commands that rich gives."""
    lines, row, column = [""], 0, 0
    for command, text in re.findall(r"(\x1b\[\??\d*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", stream):
        if command == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif command == "\r":
            column = 0
        elif command == "\x1b[1A":
            row = max(row - 1, len(lines) - height, 0)  # what has left the screen is out of reach
        elif command == "\x1b[2K":
            lines[row] = ""
        elif not command:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        else:
            assert command in ("\x1b[?25l", "\x1b[?25h"), repr(command)
    while lines and not lines[-1]:
        lines.pop()
    return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    monkeypatch.setenv("TERM", "xterm")
    stream = StringIO()
    errors = Console(file=stream, force_terminal=True, color_system=None, width=80, height=24, soft_wrap=True)
    monkeypatch.setattr(console, "errors", errors)
    return stream


def test_the_table_stays_below_what_is_said_and_goes_at_the_end(terminal: StringIO) -> None:
    console.errors.print("before")
    with live_view() as show:
        show(a_status(trials=1))
        show(a_status(trials=3))
        console.errors.print("said")
        sys.stderr.write("from a library\n")
        with console.step("moving a shard", "layers") as progress:
            progress(1, 4)
            assert "moving" not in terminal.getvalue()  # no second live display
        show(a_status(trials=2))
        seen = screen(terminal.getvalue())
        assert seen[:3] == ["before", "said", "from a library"]
        assert seen[3].startswith("  moving a shard")
        assert seen[4:] == rendered(a_status(trials=2), 80)
    assert screen(terminal.getvalue()) == seen[:4]
    with console.step("and bars are back") as progress:
        progress(1, 4)
        assert "and bars" in terminal.getvalue()


@pytest.mark.parametrize("height", [5, 24])
def test_an_interrupted_table_leaves_nothing(terminal: StringIO, height: int) -> None:
    console.errors.height = height

    def interrupted() -> None:
        with live_view() as show:
            show(a_status(trials=6, shards=8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen(terminal.getvalue(), height) == []
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_a_dumb_terminal_gets_lines(terminal: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(console, "errors", Console(file=terminal, force_terminal=True, color_system=None))
    with live_view() as show:
        show(a_status())
    assert "quickstart, trials: 12 of 40 trials" in terminal.getvalue()


# time left


def test_time_left_of_equal_trials_is_exact() -> None:
    """Against a schedule played out: at any time, by then known durations tell the end."""
    fresh = random.Random()
    for _ in range(200):
        total, at_once, length = fresh.randint(2, 30), fresh.randint(1, 8), fresh.uniform(1, 100)
        slots = [0.0] * at_once
        starts = []
        for _ in range(total):
            starts.append(heapq.heappop(slots))
            heapq.heappush(slots, starts[-1] + length)
        end = max(starts) + length
        now = fresh.uniform(length, end)
        finished = sum(start + length <= now for start in starts)
        taken = [now - start for start in starts if start <= now < start + length]
        left = seconds_left(finished, total, [length] * finished, at_once, taken)
        assert left == pytest.approx(end - now, abs=1e-9 * end)


def test_time_left_of_unequal_trials() -> None:
    assert seconds_left(0, 4, [], 2, [5.0]) is None
    assert seconds_left(1, 4, [5.0], 0, []) is None  # all replicas are gone
    assert seconds_left(4, 4, [5.0, 1.0, 1.0], 2, []) == 0.0
    assert seconds_left(2, 3, [10.0, 100.0], 1, [20.0]) == 80.0  # as that which took longer
    assert seconds_left(2, 3, [10.0, 20.0], 1, [5.0]) == 10.0
    assert seconds_left(2, 3, [10.0, 20.0], 1, [30.0]) == 0.0  # longer than any: any time now
    assert seconds_left(2, 6, [10.0, 30.0], 2, [5.0, 25.0]) == 35.0  # slots are free after 5 and 15: 25, 35
    assert seconds_left(2, 5, [10.0, 30.0], 1, [5.0, 25.0]) == 35.0  # a replica was lost; it fits one slot from 15


# what bounded it


def test_the_bottleneck_is_named() -> None:
    layers = ((0, 9), (10, 14), (15, 20))
    one = describe_bottleneck([0.5, 0.97, 0.4], 4, 3, layers)
    assert one.startswith("shard 1 (layers 10-14) has the most work, or the slowest device: busy 97% of the time")
    assert "the other shards 45%" in one
    two = describe_bottleneck([0.9, 0.95, 0.3], 4, 3)
    assert two.startswith("shards 0 and 1 have the most work")
    assert "the other shards 30%" in two
    assert describe_bottleneck([0.9] * 60 + [0.1] * 4, 4, 64).startswith("60 shards have the most work")
    assert describe_bottleneck([0.85, 0.9, 0.8], 4, 3).startswith(
        "all shards are busy most of the time (80% to 90%)"
    )
    assert "more or faster devices" in describe_bottleneck([0.85, 0.9, 0.8], 4, 3)
    idle = describe_bottleneck([0.3, 0.6, 0.1], 4, 3)  # uneven, but none is what the others wait for all the time
    assert idle.startswith(
        "no shard is busy most of the time (10% to 60%): shards wait for each other or for trials"
    )
    assert "more trials at once than 4" in idle
    assert describe_bottleneck([0.93], 2, 1).startswith("the shard is busy most of the time (93%)")
    alone = describe_bottleneck([0.2], 1, 1)
    assert "the driver" in alone
    assert "wait for each other" not in alone


def test_replicas_are_averaged() -> None:
    """Shard 1 is the busiest in both replicas: what it holds, not where it is."""
    assert describe_bottleneck([0.4, 0.95, 0.5, 0.99], 4, 2).startswith("shard 1 has the most work")
    assert "(70% to 75% on average over replicas)" in describe_bottleneck([0.5, 0.5, 0.9, 1.0], 4, 2)
    with pytest.raises(AssertionError):
        describe_bottleneck([0.5] * 3, 4, 2)


# other programs' view

TELL = """
import sys, time
from mlprune.sweep.status import *
write_status(SweepStatus(sys.argv[1], "trials", float(sys.argv[2]), time.time(), 1, 4, 0,
    (TrialStatus("wanda 0.5 mono:fr", "masking", 1.5),),
    (ShardStatus(0, 0, (0, 9), "::1", 0.5, 9.5, True),), None, ("a note",)))
print("told", flush=True)
sys.stdin.readline()
remove_status()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLPRUNE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "running"


@contextmanager
def a_driver(name: str, started: float) -> Iterator["subprocess.Popen[str]"]:
    """A process that tells how its sweep stands, and ends when it is written to."""
    process = subprocess.Popen([sys.executable, "-c", TELL, name, str(started)], stdin=-1, stdout=-1, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "told\n"
            yield process
        finally:
            process.kill()


def names() -> list[str]:
    return [one.status.name for one in running_sweeps()]


def test_sweeps_are_seen_while_their_processes_live(folder: Path) -> None:
    assert running_sweeps() == []
    with a_driver("second", 2000.0) as second, a_driver("first", 1000.0) as first:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert [one.pid for one in running_sweeps()] == [first.pid, second.pid]  # the oldest first
        stored = running_sweeps()[0].status
        expected = SweepStatus(
            *("first", "trials", 1000.0, stored.now, 1, 4, 0),
            (TrialStatus("wanda 0.5 mono:fr", "masking", 1.5),),
            (ShardStatus(0, 0, (0, 9), "::1", 0.5, 9.5, True),),
            *(None, ("a note",)),
        )
        assert stored == expected
        second.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)  # dead; its parent has not asked yet
        assert psutil.Process(second.pid).status() == psutil.STATUS_ZOMBIE
        assert names() == ["first"]
        assert len(list(folder.iterdir())) == 1
        first.communicate("end\n")
        assert list(folder.iterdir()) == []
        assert names() == []


def test_the_file_of_a_dead_process_is_removed(folder: Path) -> None:
    with a_driver("killed", 1000.0) as process:
        process.kill()
        process.wait()
        assert len(list(folder.iterdir())) == 1
        assert names() == []
        assert list(folder.iterdir()) == []


def test_a_reused_process_id_is_recognised(folder: Path) -> None:
    write_status(a_status())
    assert names() == ["quickstart"]
    file = next(folder.iterdir())
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"born": stored["born"] - 60}))
    assert names() == []
    assert not file.exists()


def test_files_of_another_host_stay(folder: Path) -> None:
    write_status(a_status())
    mine = next(folder.iterdir())
    theirs = folder / f"{2**22 + 1}@elsewhere.json"
    theirs.write_text(mine.read_text())
    assert names() == ["quickstart"]
    assert theirs.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 300, b"{", b"[]", b"5", b'{"born": "x"}', b"[" * 100_000, b"\xff"]
)
def test_a_damaged_file_is_removed(content: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_status(a_status())
    damaged = folder / next(folder.iterdir()).name.replace(str(os.getpid()), "1")
    damaged.write_bytes(content)
    assert names() == ["quickstart"]
    assert "is damaged: removed" in caplog.text
    assert not damaged.exists()


@pytest.mark.parametrize("changes", [{"started": "x"}, {"trials": [5]}, {"notes": 5}, {"total": None}])
def test_a_status_of_other_types_is_not_shown(changes: dict[str, object], folder: Path) -> None:
    write_status(a_status())
    file = next(folder.iterdir())
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"status": stored["status"] | changes}))
    assert running_sweeps() == []


def test_a_sweep_of_another_version_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_status(a_status())
    file = next(folder.iterdir())
    stored = json.loads(file.read_text())
    for changed in (stored["status"] | {"new": 1}, {"name": "quickstart"}):
        file.write_text(json.dumps(stored | {"status": changed}))
        assert running_sweeps() == []
        assert f"process {os.getpid()} runs a sweep with another version" in caplog.text
        caplog.clear()
    assert file.exists()


def test_a_reader_never_sees_half_a_file() -> None:
    done = threading.Event()

    def write() -> None:
        for number in range(150):
            write_status(replace(a_status(32, 8, number % 8 + 1), finished=number))
        done.set()

    writer = threading.Thread(target=write)
    write_status(a_status())
    writer.start()
    while not done.is_set():
        assert names() == ["quickstart"]
    writer.join()
    remove_status()
    assert running_sweeps() == []
    remove_status()  # twice does no harm


def test_a_sweep_continues_if_its_status_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MLPRUNE_STATE_DIR", str(tmp_path / "taken"))
    write_status(a_status())
    write_status(a_status())
    remove_status()
    assert caplog.text.count("mlprune status will not show this sweep") == 1


def test_status() -> None:
    none = CliRunner().invoke(main, ["status"])
    assert (none.exit_code, none.stdout) == (0, "no sweep runs on this machine\n")
    empty = CliRunner().invoke(main, ["status", "--json", "-"])
    assert json.loads(empty.stdout) == {"sweeps": []}
    write_status(replace(a_status(), now=time.time(), started=time.time() - 300))
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 0
    title, counts, *_ = shown.stdout.splitlines()
    assert title == f"process {os.getpid()}, quickstart: trials, 5 min so far, about 14 min left"
    assert counts.startswith("12 of 40 trials")
    assert "has not updated" not in shown.stdout
    write_status(replace(a_status(), now=time.time() - 600))
    stuck = CliRunner().invoke(main, ["status"]).stdout
    assert f"note: process {os.getpid()} has not updated its status for 10 min" in stuck
    values = json.loads(CliRunner().invoke(main, ["status", "--json", "-"]).stdout)
    assert [(one["pid"], one["name"], len(one["trials"])) for one in values["sweeps"]] == [
        (os.getpid(), "quickstart", 3)
    ]
    refused = CliRunner().invoke(main, ["status", "--set", "name=x"])
    assert refused.exit_code == 2
    remove_status()


def test_status_answers_at_once() -> None:
    """It loads none of what takes seconds."""
    program = "import sys; from mlprune.cli import main; main(['status'], standalone_mode=0); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, modules = done.stdout.splitlines()
    assert first == "no sweep runs on this machine"
    assert not {"torch", "ray", "mlflow", "transformers", "numpy"} & set(modules.split())


def test_one_update_costs_little() -> None:
    """One call a second of each must not be felt: well under a tenth of a core, with much to show."""
    shown = a_status(32, 8, 64, LONG)
    paper = Console(width=100, file=StringIO())
    best = 1.0
    for _ in range(5):
        started = time.process_time()
        paper.print(render(shown, 100))
        write_status(shown)
        best = min(best, time.process_time() - started)
    remove_status()
    assert best < 0.1


def test_a_status_survives_its_file() -> None:
    """`running_sweeps` gives back the very thing, whatever stood in it."""
    shown = replace(a_status(3, 2, 3), now=time.time())
    write_status(shown)
    assert running_sweeps() == [status_module.RunningSweep(os.getpid(), shown)]
    remove_status()
