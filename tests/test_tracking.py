"""What a sweep logs, with real MLflow: a database, and a server that dies, hangs, and loses its responses."""

import http.client
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from mlprune.errors import SpecError
from mlprune.storage.results import Result
from mlprune.sweep.grid import parse_variant
from mlprune.tracking.delivery import DeliveryQueue, UnavailableError
from mlprune.tracking.lookup import load_trial_items, parallel_coordinates_link
from mlprune.tracking.mlflow_client import check_tracking, open_client
from mlprune.tracking.tracker import SweepTracker, log_analysis
from tests.servers import Server, free_port

WANDA = parse_variant("mono:en", "wanda", 0.5, "unstructured", "dense")


@pytest.fixture(scope="module")
def made_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to be copied: creating them takes seconds."""
    file = tmp_path_factory.mktemp("database") / "m.db"
    open_client(f"sqlite:///{file}")
    return file


@pytest.fixture
def database(made_database: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(made_database, tmp_path)}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, made_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(made_database, folder)
    made = Server(folder)
    try:
        made.wait()
        yield made
    finally:
        made.kill()


Fault = Callable[[Callable[[], tuple[int, bytes]]], tuple[int, bytes] | None]


def lost(forward: Callable[[], tuple[int, bytes]]) -> None:
    """The server carries out the request, and dies before it responds."""
    forward()


def late(forward: Callable[[], tuple[int, bytes]]) -> None:
    """The connection breaks; the server carries out the request long after."""
    threading.Timer(1.0, forward).start()


def hung(forward: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    """The response comes after the request has timed out."""
    time.sleep(1.3)
    return forward()


def unavailable(forward: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    return 503, b"no backend"


def forbidden(forward: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    return 403, b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}'


class Proxy:
    """A proxy of a server. Each fault is applied once, to the next request whose path contains its text."""

    def __init__(self, port: int) -> None:
        self.faults: list[tuple[str, Fault]] = []
        self.seen: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.seen.append(self.path)
                answer = proxy.answer(self.path, partial(self.forward, body))
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def forward(self, body: bytes) -> tuple[int, bytes]:
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    return answer.status, answer.read()

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:  # the client has gone
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, forward: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes] | None:
        for fault in self.faults:
            if fault[0] in path:
                self.faults.remove(fault)
                return fault[1](forward)
        return forward()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with closing(Proxy(server.port)) as made:
        yield made


Opened = Callable[..., SweepTracker]


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Opens trackers in an experiment of the test's own."""
    made: list[SweepTracker] = []

    def new(uri: str, sweep_key: str = "sweep") -> SweepTracker:
        made.append(SweepTracker(uri, request.node.name, tmp_path / "files", sweep_key, "tiny"))
        return made[-1]

    yield new
    for tracker in made:
        tracker.close()


def arrived(tracker: SweepTracker, patience: float = 30) -> None:
    assert tracker.flush(patience, lambda count, why: None), (tracker.pending, tracker.last_error)


def runs_of(uri: str, tracker: SweepTracker) -> dict[str, Any]:
    """The sweep's runs by their trial's key, the parent run by ''. Fails if a trial has two."""
    found = MlflowClient(uri).search_runs([tracker.experiment_id])
    keys = [run.data.tags.get("mlprune.trial", "") for run in found]
    assert len(set(keys)) == len(keys), keys
    return dict(zip(keys, found, strict=True))


def deleted(uri: str, tracker: SweepTracker) -> list[Any]:
    return list(MlflowClient(uri).search_runs([tracker.experiment_id], run_view_type=ViewType.DELETED_ONLY))


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, name)]


def small_sweep(tracker: SweepTracker) -> None:
    """Call each method that logs."""
    tracker.log_sweep({"model": "tiny", "seed": 0}, {"spec.yaml": "name: tiny\n"})
    tracker.start_trial("dense", None)
    tracker.log_trial("dense", None, {"bits": 1.25})
    tracker.finish_trial(Result("dense", None, {"bits": 1.5, "nothing": float("nan")}), lambda: "[1]")
    for step in range(3):
        tracker.log_sweep_metrics({"speed": 10.0 * step}, step)
    tracker.start_trial("a", WANDA)
    tracker.log_trial("a", WANDA, {"bits": 2.0})
    tracker.finish_trial(Result("a", WANDA, {"bits": 2.5}, digest="d1"), lambda: "[2]")
    tracker.fail_trial("b", WANDA, "it died")
    tracker.start_trial("c", WANDA)
    tracker.describe("# tiny")


def logged(uri: str, tracker: SweepTracker) -> dict[str, Any]:
    """Everything that a small sweep logged, except ids and times."""
    client, everything = MlflowClient(uri), {}
    for key, run in runs_of(uri, tracker).items():
        run_id = run.info.run_id
        files = [item.path for item in client.list_artifacts(run_id)]
        tags = {
            name: value for name, value in run.data.tags.items() if "user" not in name and "source" not in name
        }
        child = tags.pop("mlflow.parentRunId", None)
        assert child == (tracker.parent_id if key else None)
        points = {name: sorted(map(str, history(uri, run_id, name))) for name in run.data.metrics}
        texts = {file: Path(client.download_artifacts(run_id, file)).read_text() for file in files}
        everything[key] = (run.info.status, run.info.run_name, run.data.params, tags, points, texts)
    return everything


def finished(uri: str, tracker: SweepTracker, folder: Path) -> dict[str, Any]:
    picture = folder / "picture.png"
    picture.write_text("a picture")
    small_sweep(tracker)
    tracker.finish_sweep("FAILED", {"best.bits": 2.5}, [picture])
    arrived(tracker)
    return logged(uri, tracker)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, made_database: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    uri = f"sqlite:///{shutil.copy(made_database, folder)}"
    with closing(SweepTracker(uri, "one", folder / "files", "sweep", "tiny")) as tracker:
        return finished(uri, tracker, folder)


def test_what_is_logged_is_in_the_database(undisturbed: dict[str, Any]) -> None:
    statuses = {key: run[0] for key, run in undisturbed.items()}
    assert statuses == {"": "FAILED", "dense": "FINISHED", "a": "FINISHED", "b": "FAILED", "c": "KILLED"}
    _, name, params, tags, points, texts = undisturbed["a"]
    assert (name, params["score"], tags["mlprune.masks"]) == (WANDA.short, "wanda", "d1")
    assert (points, texts) == ({"bits": ["(0, 2.0)", "(0, 2.5)"]}, {"items.json": "[2]"})
    assert undisturbed["b"][3]["mlprune.cause"] == "it died"
    _, _, params, tags, points, texts = undisturbed[""]
    assert (params, tags["mlflow.note.content"]) == ({"model": "tiny", "seed": "0"}, "# tiny")
    assert points == {"best.bits": ["(0, 2.5)"], "speed": ["(0, 0.0)", "(1, 10.0)", "(2, 20.0)"]}
    assert texts == {"spec.yaml": "name: tiny\n", "picture.png": "a picture"}


# each request that a small sweep makes, by a part of its path
REQUESTS = ("runs/create", "runs/search", "runs/get", "runs/update", "log-batch", "set-tag", "artifacts")


@pytest.mark.parametrize("fault", [lost, late, unavailable, hung])
def test_failed_requests_change_nothing_in_the_end(
    fault: Fault, undisturbed: dict[str, Any], proxy: Proxy, server: Server, opened: Opened, tmp_path: Path
) -> None:
    tracker = opened(proxy.uri)
    requests = ("runs/create", "log-batch") if fault is hung else REQUESTS
    proxy.faults = [(part, fault) for part in requests]
    assert finished(server.uri, tracker, tmp_path) == undisturbed
    assert not proxy.faults, "not all faults were used"
    if fault in (lost, unavailable):  # with the others, the request that timed out may still be carried out
        assert not deleted(server.uri, tracker), "made twice"


def test_what_was_sent_twice_is_logged_once(proxy: Proxy, server: Server, opened: Opened) -> None:
    tracker = opened(proxy.uri)
    proxy.faults = [("log-batch", lost)] * 3
    tracker.log_sweep_metrics({"speed": 1.0, "nothing": float("nan")}, 0)
    time.sleep(0.002)
    tracker.log_sweep_metrics({"speed": 1.0}, 0)  # measured again: another point with the same value
    arrived(tracker)
    assert sum("log-batch" in path for path in proxy.seen) == 5
    assert len(history(server.uri, tracker.parent_id, "nothing")) == 1
    assert history(server.uri, tracker.parent_id, "speed") == [(0, 1.0)] * 2


def test_a_duplicate_run_is_deleted(proxy: Proxy, server: Server, opened: Opened) -> None:
    """A request that the server carries out long after: the duplicate cannot be known before it exists."""
    tracker = opened(proxy.uri)
    proxy.faults = [("runs/create", late)]
    tracker.start_trial("a", WANDA)
    arrived(tracker)
    time.sleep(1.2)
    client = MlflowClient(server.uri)
    assert len(client.search_runs([tracker.experiment_id])) == 3, "the server did not carry it out"
    tracker.finish_trial(Result("a", WANDA, {"bits": 1.0}), lambda: "[]")
    tracker.finish_sweep("FINISHED", {}, [])
    arrived(tracker)
    assert {run.info.status for run in runs_of(server.uri, tracker).values()} == {"FINISHED"}
    assert runs_of(server.uri, tracker)["a"].info.run_id == tracker.run_id("a")
    assert len(deleted(server.uri, tracker)) == 1


def test_a_server_that_dies_does_not_disturb_the_sweep(server: Server, opened: Opened) -> None:
    tracker = opened(server.uri)
    started = int(time.time() * 1000)
    total, put, longest = 150, 0, 0.0

    def log_until(end: int) -> None:
        nonlocal put, longest
        while put < end:
            before = time.monotonic()
            key = f"trial-{put // 10}"
            tracker.log_trial(key, WANDA, {"bits": float(put)})
            tracker.log_sweep_metrics({"speed": float(put)}, put)
            if put % 10 == 9:
                tracker.finish_trial(Result(key, WANDA, {"last": float(put)}), partial("[{}]".format, put))
            longest = max(longest, time.monotonic() - before)
            put += 1

    log_until(80)
    while tracker.pending > 60:  # in the middle
        time.sleep(0.01)
    assert tracker.pending > 10
    server.kill()
    log_until(130)
    deadline = time.monotonic() + 20
    while "refused" not in str(tracker.last_error):
        assert time.monotonic() < deadline, tracker.last_error
        time.sleep(0.02)
    waited: list[tuple[int, str]] = []
    pending = tracker.pending
    assert not tracker.flush(1.5, lambda count, why: waited.append((count, why)))
    assert pending > 60
    assert set(waited) == {(pending, tracker.last_error)}
    log_until(total)
    stopped = int(time.time() * 1000)
    server.start()
    time.sleep(0.5)  # so that the time of arrival is not the time of the event
    arrived(tracker, patience=60)
    assert tracker.last_error is None
    assert longest < 0.5, "the sweep waited"

    found = runs_of(server.uri, tracker)
    assert found.keys() == {"", *(f"trial-{n}" for n in range(total // 10))}
    points = MlflowClient(server.uri).get_metric_history(tracker.parent_id, "speed")
    assert [(point.step, point.value) for point in points] == [(n, float(n)) for n in range(total)]
    times = [point.timestamp for point in points]
    assert times == sorted(times)
    assert started <= times[0] <= times[-1] <= stopped, "not the time of the event"
    for n in range(total // 10):
        run = found[f"trial-{n}"]
        assert run.info.run_id == tracker.run_id(f"trial-{n}")
        assert run.info.status == "FINISHED"
        assert started <= run.info.start_time <= run.info.end_time <= stopped
        bits = history(server.uri, run.info.run_id, "bits")  # in any order: they have one step
        assert sorted(bits) == [(0, float(10 * n + number)) for number in range(10)]
        assert run.data.metrics["last"] == 10 * n + 9
    assert load_trial_items(server.uri, tracker.run_id("trial-14"), "RUN")[1] == "[149]"


def test_a_killed_sweep_continues_its_runs(proxy: Proxy, server: Server, opened: Opened) -> None:
    first = opened(proxy.uri)
    first.start_trial("a", WANDA)
    first.start_trial("b", WANDA)
    first.fail_trial("b", WANDA, "it died")
    first.finish_sweep("KILLED", {}, [])
    arrived(first)
    assert {run.info.status for run in runs_of(server.uri, first).values()} == {"KILLED", "FAILED"}
    proxy.faults = [("log-batch", unavailable)] * 99
    first.start_trial("c", WANDA)  # the run is created, and then the server dies: it has no params
    while not first.last_error:
        time.sleep(0.01)
    first.close()  # as when it is killed
    proxy.faults = []

    again = opened(proxy.uri)
    assert again.parent_id == first.parent_id
    for key in "abc":
        again.start_trial(key, WANDA)
    arrived(again)
    found = runs_of(server.uri, again)
    assert {run.info.status for run in found.values()} == {"RUNNING"}
    assert found["a"].info.run_id == first.run_id("a")
    assert found["c"].data.params == found["a"].data.params != {}
    for key in "abc":
        again.finish_trial(Result(key, WANDA, {"bits": 1.0}), lambda: "[]")
        again.finish_trial(Result(key, WANDA, {"bits": 7.0}), lambda: "never requested")
    arrived(again)
    found = runs_of(server.uri, again)
    assert {found[key].info.status for key in "abc"} == {"FINISHED"}
    assert "mlprune.cause" not in found["b"].data.tags
    assert history(server.uri, again.run_id("a"), "bits") == [(0, 1.0)]


def test_a_trial_that_was_dropped_says_so_until_it_is_evaluated(opened: Opened, database: str) -> None:
    """A sweep is resumed in which other trials had failed, so that a race takes other decisions."""
    tracker = opened(database)
    tracker.start_trial("a", WANDA)
    tracker.finish_trial(Result("a", WANDA, {"bits": 1.0}), lambda: "[1]", "dropped in the race")
    tracker.log_trial("a", WANDA, {"loss.mean": 0.1})
    tracker.finish_trial(Result("a", WANDA, {"bits": 9.0}), lambda: "never requested", "dropped in the race")
    arrived(tracker)
    run = runs_of(database, tracker)["a"]
    assert (run.info.status, run.data.tags["mlprune.standing"]) == ("FINISHED", "dropped in the race")
    assert run.data.metrics == {"bits": 1.0, "loss.mean": 0.1}
    tracker.start_trial("a", WANDA)
    tracker.finish_trial(Result("a", WANDA, {"bits": 2.0}), lambda: "[2]")
    arrived(tracker)
    run = runs_of(database, tracker)["a"]
    assert run.info.status == "FINISHED"
    assert "mlprune.standing" not in run.data.tags
    assert run.data.metrics == {"bits": 2.0, "loss.mean": 0.1}
    assert load_trial_items(database, tracker.run_id("a"), "RUN")[1] == "[2]"


def test_a_rejected_update_is_raised_once_and_the_others_are_delivered(
    proxy: Proxy, server: Server, opened: Opened
) -> None:
    tracker = opened(proxy.uri)
    tracker.log_sweep({"seed": 0}, {})
    tracker.log_sweep({"seed": 1}, {})  # MLflow changes no param
    tracker.log_sweep_metrics({"speed": 1.0}, 0)
    with pytest.raises(SpecError) as refused:
        arrived(tracker)
    line = str(refused.value)
    assert line.startswith(f"tracking.uri: '{proxy.uri}': MLflow refuses what is logged: ")
    assert "\n" not in line
    assert "seed" in line
    arrived(tracker)
    assert history(server.uri, tracker.parent_id, "speed") == [(0, 1.0)]
    proxy.faults = [("runs/create", forbidden)]
    tracker.start_trial("a", WANDA)
    while tracker.pending:
        time.sleep(0.01)
    with pytest.raises(SpecError, match="not yours"):
        tracker.log_sweep_metrics({"speed": 2.0}, 1)
    arrived(tracker)
    assert history(server.uri, tracker.parent_id, "speed") == [(0, 1.0), (1, 2.0)]


def test_a_locked_database_is_retried(opened: Opened, database: str, tmp_path: Path) -> None:
    tracker = opened(database)

    def hurry(conn: Any, cursor: Any, statement: str, *args: Any) -> None:
        if "busy_timeout" in statement:
            cursor.execute("PRAGMA busy_timeout = 50")

    event.listen(Engine, "after_cursor_execute", hurry)
    try:
        with closing(sqlite3.connect(tmp_path / "m.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            tracker.log_sweep_metrics({"speed": 1.0}, 0)
            assert not tracker.flush(1.0, lambda count, why: None)
            assert tracker.last_error == "database is locked"
            other.rollback()
        arrived(tracker)
    finally:
        event.remove(Engine, "after_cursor_execute", hurry)
    assert history(database, tracker.parent_id, "speed") == [(0, 1.0)]


PROGRAM = """
import sys
from pathlib import Path
from mlprune.storage.results import Result
from mlprune.tracking.tracker import SweepTracker
folder, key, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracker = SweepTracker(f"sqlite:///{folder}/m.db", "ours", folder / "files", key, key)
print("open", flush=True)
try:
    for n in range(count):
        tracker.log_sweep_metrics({"speed": float(n)}, n)
    tracker.start_trial("a", None)
    if count > 100:
        tracker.flush(99, print)  # this takes long
    tracker.finish_trial(Result("a", None, {"bits": 1.0}), lambda: "[]")
    tracker.finish_sweep("FINISHED", {}, [])
except KeyboardInterrupt:
    print("interrupted", tracker.pending, flush=True)
    tracker.finish_sweep("KILLED", {}, [])
print("flushed", tracker.flush(60, print))
"""


def program(folder: Path, key: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), key, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def test_two_sweeps_create_and_share_a_database_and_one_is_interrupted(tmp_path: Path) -> None:
    quick, slow = program(tmp_path, "quick", 20), program(tmp_path, "slow", 300)
    assert slow.stdout is not None
    assert slow.stdout.readline() == "open\n", slow.communicate()[1]
    time.sleep(0.3)
    slow.send_signal(signal.SIGINT)
    output = slow.stdout.read()
    pending = re.match(r"interrupted (\d+)\nflushed True\n", output)
    assert pending, (output, slow.communicate()[1])
    assert int(pending[1]) > 10, "interrupted too late to test anything"
    assert quick.communicate(timeout=60)[0] == "open\nflushed True\n"
    assert slow.communicate()[1] == ""
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    found = {
        (run.info.run_name, run.data.tags["mlflow.parentRunId"] if "mlprune.trial" in run.data.tags else ""): run
        for run in client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    }
    parents = {name: found[name, ""] for name in ("quick", "slow")}
    trials = {name: found["dense", parents[name].info.run_id] for name in parents}
    assert len(found) == 4
    assert {name: (parents[name].info.status, trials[name].info.status) for name in parents} == {
        "quick": ("FINISHED", "FINISHED"),
        "slow": ("KILLED", "KILLED"),
    }
    steps = [point.step for point in client.get_metric_history(parents["slow"].info.run_id, "speed")]
    assert sorted(steps) == list(range(300)), "Ctrl-C lost something"
    left = {file.name for file in tmp_path.iterdir()}
    assert left <= {"m.db", "m.db.lock", "files"}, left


def test_a_deleted_experiment_is_reported(opened: Opened, database: str) -> None:
    tracker, client = opened(database), MlflowClient(database)
    client.delete_experiment(tracker.experiment_id)
    with pytest.raises(SpecError, match=f"--experiment-id {tracker.experiment_id}.*tracking.experiment="):
        opened(database)
    client.restore_experiment(tracker.experiment_id)
    assert opened(database).parent_id == tracker.parent_id


def test_an_unreachable_server_is_reported_at_once(opened: Opened, tmp_path: Path) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    started = time.monotonic()
    for open_it in (opened, check_tracking, lambda uri: log_analysis(uri, "x", tmp_path, "y", {}, [])):
        with pytest.raises(SpecError) as raised:
            open_it(uri)
        assert "'http://me:***@127.0.0.1" in str(raised.value)
        assert "refused" in str(raised.value)
        assert "secret" not in str(raised.value)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("nonsense://x", "unsupported URI .nonsense://x."),
        ("postgresql://me:secret@127.0.0.1:1/db", "No module named 'psycopg|refused"),
        ("sqlite:///FILE", "file is not a database"),
    ],
)
def test_an_invalid_uri_is_reported_in_one_line(uri: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("no database" * 100)
    with pytest.raises(SpecError, match=cause) as raised:
        check_tracking(uri.replace("FILE", str(tmp_path / "file.txt")))
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_items_are_read_when_they_are_delivered(opened: Opened, database: str, tmp_path: Path) -> None:
    tracker = opened(database)
    items = tmp_path / "items.json"
    items.write_text("[]")
    tracker.finish_trial(Result("a", None, {}), items.read_text)
    arrived(tracker)
    items.unlink()
    tracker.finish_trial(Result("b", None, {}), items.read_text)
    with pytest.raises(FileNotFoundError):  # our own error, not the server's
        arrived(tracker)


def test_a_long_description_is_cut_at_a_line(opened: Opened, database: str) -> None:
    tracker = opened(database)
    tracker.describe("| 0123456789 |\n" * 1000)
    arrived(tracker)
    text = MlflowClient(database).get_run(tracker.parent_id).data.tags["mlflow.note.content"]
    assert set(text.splitlines()) == {"| 0123456789 |"}
    assert 7900 < len(text) <= 8000


def test_the_link_to_the_page_that_compares_runs() -> None:
    link = parallel_coordinates_link("http://me:pw@host:5000/", "7", ["a", "b"])
    assert link is not None
    assert unquote(link) == 'http://host:5000/#/compare-runs?runs=["a", "b"]&experiments=["7"]'
    assert " " not in link
    assert parallel_coordinates_link("sqlite:///x.db", "7", ["a"]) is None


def test_pauses_between_attempts_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlprune.tracking.delivery.LONGEST_PAUSE", 0.3)
    times: list[float] = []

    def update() -> None:
        times.append(time.monotonic())
        if len(times) < 6:
            raise UnavailableError("not yet")

    with closing(DeliveryQueue()) as queue:
        queue.submit(update)
        assert queue.flush(5, lambda count, why: None)
    pauses = [after - before for before, after in pairwise(times)]
    assert all(low <= pause < low + 0.25 for low, pause in zip((0.1, 0.2, 0.3, 0.3, 0.3), pauses, strict=True))


def test_flush_gives_up_only_when_nothing_is_delivered() -> None:
    """It waits for many slow updates, but not for one that hangs."""
    with closing(DeliveryQueue()) as queue:
        for _ in range(6):
            queue.submit(lambda: time.sleep(0.15))
        assert queue.flush(0.5, lambda count, why: None)
        held = threading.Event()
        queue.submit(partial(held.wait, 20))
        started = time.monotonic()
        assert not queue.flush(0.3, lambda count, why: None)
        assert 0.3 <= time.monotonic() - started < 1
        held.set()
        assert queue.flush(5, lambda count, why: None)
