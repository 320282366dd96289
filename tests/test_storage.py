"""Storages: files are written whole or not at all and stay inside, and every failure is reported in one line.

S3 and Google Cloud Storage are replaced by local servers (moto, and an emulator) that s3fs and gcsfs talk to.
"""

import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlprune.errors import StorageError
from mlprune.storage.files import Storage, check_storage, write_whole
from mlprune.storage.lock import sweep_lock
from tests.servers import free_port

SPAWN = multiprocessing.get_context("spawn")
REMOTE = ("memory", "s3", "gs")
EVERYWHERE = ("folder", *REMOTE)
SHARED = ("folder", "s3", "gs")  # by processes
TURNS = 5


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Start an S3 with one bucket, `bucket`; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files("s3").mkdir("bucket")
        yield f"http://{host}:{port}"
        clear_file_systems("s3")
    server.stop()


def cancelled(request: Any, response: Any, storage: Any, *_: Any, **__: Any) -> None:
    """Google's answer to an aborted upload, which the emulator lacks."""
    response.status = SimpleNamespace(value=499, phrase="Client Closed Request")


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """Start a Google Cloud Storage with one bucket, `bucket`; yields its address."""
    from gcp_storage_emulator import server as emulator  # type: ignore[import-untyped]
    from gcp_storage_emulator.handlers import objects  # type: ignore[import-untyped]

    (routes,) = (found for _, found in emulator.HANDLERS if objects.upload_partial in found.values())
    routes["DELETE"] = cancelled
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        environment.setenv("NO_GCE_CHECK", "true")  # otherwise gcsfs looks for the credentials of a Google machine
        yield f"http://127.0.0.1:{port}"
        clear_file_systems("gs")
    server.stop()


def files(protocol: str) -> Any:
    """The file system that a Storage uses."""
    from mlprune.storage import files as storage

    return storage._file_system(f"{protocol}://bucket")


def clear_file_systems(protocol: str) -> None:
    """Drop fsspec's file systems, which stay connected to the server that they were created for."""
    type(files(protocol)).clear_instance_cache()


def opened(kind: str, folder: Path, request: pytest.FixtureRequest) -> Storage:
    if kind in ("s3", "gs"):
        request.getfixturevalue(kind)
    return Storage(str(folder / "store") if kind == "folder" else f"{kind}://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return opened(request.param, tmp_path, request)


def held(storage: Storage) -> list[str]:
    """Names of all files in the storage, hidden ones too."""
    if folder := storage.folder:
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    protocol, _, path = storage.address.partition("://")
    return sorted(name.partition(path + "/")[2] for name in files(protocol).find(storage.address))


# reading and writing


@pytest.mark.parametrize("storage", EVERYWHERE, indirect=True)
def test_written_files_are_read_back(storage: Storage) -> None:
    contents = {
        "a": b"",
        "b/c.json": b"[1]",
        "b/d e+%é.json": bytes(range(256)),
        "b/c.json.old": os.urandom(300_000),
    }
    for name in contents:
        assert not storage.exists(name)
        for missing in (storage.read, storage.size):
            with pytest.raises(FileNotFoundError):
                missing(name)
    for name, content in contents.items():
        storage.write_whole(name, content)
    for name, content in contents.items():
        assert storage.read(name) == content
        assert storage.size(name) == len(content)
        assert storage.exists(name)
    assert held(storage) == sorted(contents)
    storage.write_whole("b/c.json", b"other")
    assert storage.read("b/c.json") == b"other"
    assert storage.size("b/c.json") == 5, "no listing is remembered"


@pytest.mark.parametrize("storage", ["s3", "gs"], indirect=True)
def test_changes_by_other_processes_are_seen_at_once(storage: Storage) -> None:
    protocol, _, place = storage.address.partition("://")
    other = type(files(protocol))(skip_instance_cache=True)
    for turn in range(2):
        assert held(storage) == []
        assert not storage.exists("folder/file")
        other.pipe_file(f"{place}/folder/file", b"1" * (turn + 1))
        assert storage.size("folder/file") == turn + 1
        assert held(storage) == ["folder/file"]
        other.rm_file(f"{place}/folder/file")


@pytest.mark.parametrize(
    "name", ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a//b", "a/", "./a", "a\0"]
)
@pytest.mark.parametrize("storage", ["folder", "memory"], indirect=True)
def test_names_outside_the_storage_are_refused(name: str, storage: Storage) -> None:
    uses: list[Callable[[], object]] = [
        lambda: storage.read(name),
        lambda: storage.size(name),
        lambda: storage.exists(name),
        lambda: storage.write_whole(name, b""),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="inside"):
            use()
    assert held(storage) == []


def test_a_storage_is_pickled_as_its_address(tmp_path: Path) -> None:
    for address in (str(tmp_path), "s3://bucket/x", "gs://bucket/x"):
        again = pickle.loads(pickle.dumps(Storage(address)))  # noqa: S301
        assert again == Storage(address)
        assert str(again) == address
    assert Storage(str(tmp_path)).folder == tmp_path
    assert Storage("s3://bucket/x").folder is None


# checks


@pytest.mark.parametrize("storage", EVERYWHERE, indirect=True)
def test_a_check_leaves_nothing_behind(storage: Storage, tmp_path: Path) -> None:
    check_storage(storage.address)
    assert not list(tmp_path.iterdir())
    assert storage.folder or held(storage) == []
    if storage.address.startswith("s3"):
        assert files("s3").call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", []) == []
    storage.write_whole("a", b"1")
    check_storage(storage.address)
    assert held(storage) == ["a"]


ADDRESSES = {
    "ftp://host/x": ("ftp://host/x", "s3://bucket/folder"),
    "file:///x": ("file:///x", "use a folder"),
    "simplecache::s3://bucket/x": ("unknown kind of storage",),
    "s3://": ("names no bucket", "s3://bucket/folder"),
    "gs:///": ("names no bucket", "gs://bucket/folder"),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_invalid_addresses_are_refused(address: str) -> None:
    for use in (Storage, check_storage):
        message = str(refused(partial(use, address)))
        assert message.startswith("storage: ")
        assert all(word in message for word in ADDRESSES[address])


@pytest.mark.parametrize(
    "address", ["s3://KEY:verysecret@bucket/x", "s3://KEY:very/secret@bucket", "gs://bucket/x?token=verysecret"]
)
def test_secrets_in_an_address_are_refused_and_not_displayed(address: str) -> None:
    for use in (Storage, check_storage):
        message = str(refused(partial(use, address)))
        assert "no secrets in specs" in message
        assert not any(word in message for word in ("KEY", "secret@", "very", "token"))


def refused(use: Callable[[], object]) -> StorageError:
    """Return the error, which displays one line and no context."""
    with pytest.raises(StorageError) as raised:
        use()
    error = raised.value
    assert error.__suppress_context__ or error.__context__ is None
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize(("protocol", "module"), [("s3", "s3fs"), ("gs", "gcsfs.core")])
def test_a_missing_package_is_named(protocol: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    expected = f"{protocol}://bucket/x: needs a package: pip install 'mlprune[{protocol}]'"
    assert str(refused(partial(check_storage, f"{protocol}://bucket/x", "place"))) == f"place: {expected}"
    assert str(refused(partial(Storage(f"{protocol}://bucket/x").read, "a"))) == f"storage: {expected}"


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_missing_bucket_is_named(protocol: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(protocol)
    address = f"{protocol}://nobucket/x"
    assert str(refused(lambda: check_storage(address))).startswith(
        f"storage: {address}: the bucket does not exist"
    )
    assert "no longer exists" in str(refused(lambda: Storage(address).write_whole("a", b"1")))
    with pytest.raises(FileNotFoundError):
        Storage(address).read("a")


def uses(address: str) -> list[Callable[[], object]]:
    storage = Storage(address)
    return [
        lambda: check_storage(address),
        lambda: storage.read("a"),
        lambda: storage.exists("a"),
        lambda: storage.write_whole("a", b"1"),
    ]


def test_wrong_credentials_for_s3(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    import requests

    requests.post(f"{s3}/moto-api/reset-auth", data=b"0", timeout=10)  # from here on keys count
    try:
        for use in uses("s3://bucket/x"):
            message = str(refused(use))
            assert message.startswith("storage: s3://bucket/x: cannot be used: ")
            assert "403" in message or "InvalidAccessKeyId" in message
            assert "credentials" in message
            assert not any(secret in message + caplog.text for secret in ("verysecret", "nobody"))
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data=b"1000000000", timeout=10)


@pytest.mark.parametrize(("status", "word"), [(403, "Forbidden"), (401, "HttpError 401"), (400, "HttpError 400")])
def test_wrong_credentials_for_google(
    status: int, word: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = json.dumps({"error": {"message": "anonymous verysecret may not"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    clear_file_systems("gs")
    try:
        for use in uses("gs://bucket/x"):
            message = str(refused(use))
            assert message.startswith(f"storage: gs://bucket/x: cannot be used: {word}; ")
            assert "verysecret" not in message
        assert "verysecret" not in caplog.text
    finally:
        clear_file_systems("gs")
        server.shutdown()
        server.server_close()


def test_an_unreachable_s3_is_reported_without_its_endpoint(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://somebody:verysecret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    clear_file_systems("s3")
    try:
        message = str(refused(partial(check_storage, "s3://bucket/x")))
        assert message.startswith("storage: s3://bucket/x: cannot be used: ")
        assert not any(secret in message for secret in ("somebody", "127.0.0.1"))
    finally:
        clear_file_systems("s3")


def test_impossible_folders_are_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for address in (taken, taken / "below"):
        assert "is not a folder" in str(refused(partial(check_storage, str(address))))
        assert "cannot be used" in str(refused(partial(Storage(str(address)).write_whole, "a", b"")))
    check_storage(str(tmp_path / "not" / "yet" / "there"))
    assert list(tmp_path.iterdir()) == [taken]


# whole or not at all


def fail(number: int) -> Callable[..., None]:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write_whole("folder/file.json", b"old")
    monkeypatch.setattr(os, "fsync", fail(number))
    for name in ("folder/file.json", "folder/never"):
        message = refused(partial(storage.write_whole, name, b"new"))
        assert str(message).startswith(f"storage: {tmp_path}: no space left (")
    with pytest.raises(OSError, match=os.strerror(number)):
        write_whole(tmp_path / "other", b"new")
    assert storage.read("folder/file.json") == b"old"
    assert held(storage) == ["folder/file.json"]


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append(f"fsync of {os.fstat(descriptor).st_size}")
        sync(descriptor)

    def replaced(partial: Path, target: Path) -> Path:
        order.append("replace")
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    Storage(str(tmp_path)).write_whole("file", b"12345")
    assert order == ["fsync of 5", "replace"]
    assert (tmp_path / "file").read_bytes() == b"12345"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


FULL_DISK = """
import os
from mlprune.errors import StorageError
from mlprune.storage.files import Storage

storage = Storage(os.getcwd() + "/disk")
storage.write_whole("a", b"a" * 300_000)
for name in ("a", "b", "folder/c"):
    try:
        storage.write_whole(name, b"b" * 900_000)
        print("written")
    except StorageError as error:
        print(error)
storage.write_whole("folder/d", b"d")
print(sorted(f"{file.name} {file.stat().st_size}" for file in storage.folder.rglob("*") if file.is_file()))
print(storage.read("a") == b"a" * 300_000)
"""


def test_a_full_disk_is_reported_and_keeps_its_files(tmp_path: Path) -> None:
    """A real disk of 1 MB, mounted for one process only."""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount += ['mount -t tmpfs -o size=1m none disk && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], cwd=tmp_path, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*mount, sys.executable, "-c", FULL_DISK]
    lines = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    start, end = f"storage: {tmp_path}/disk: no space left (", " bytes); free some, or use another storage; "
    for line in lines[:3]:
        assert line.startswith(start)
        assert end + "existing files are kept" in line
        assert int(line.removeprefix(start).partition(" ")[0].replace(",", "")) < 2**20
    assert lines[3:] == ["['a 300000', 'd 1']", "True"]


KILL_WRITERS = """
import os, random, signal, sys, time
from mlprune.storage.files import Storage

os.fsync = lambda descriptor: None  # processes are killed, the power stays on: more time for writing
storage, content = Storage(sys.argv[1]), [turn.to_bytes(8, "little") * 2**19 for turn in range(1, 5)]
storage.write_whole("folder/file", content[0])
for _ in range(100):
    writer = os.fork()
    while not writer:
        storage.write_whole("folder/file", random.choice(content))
    time.sleep(random.uniform(0, 0.02))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    assert storage.read("folder/file") in content
"""


def test_a_killed_writer_leaves_no_partial_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILL_WRITERS, str(tmp_path)], check=True)
    partial = [file for file in (tmp_path / "folder").iterdir() if file.name != "file"]
    assert partial, "no writer was killed while it wrote: nothing was tested"
    assert all(file.name.startswith(".") for file in partial)


# concurrent writers


def write_in_turn(storages: Sequence[Storage], writer: int) -> None:
    """Write one file shared by all writers, and one per writer."""
    for turn, storage in itertools.product(range(TURNS), storages):
        content = (1000 * writer + turn).to_bytes(8, "little") * 2**16
        storage.write_whole("same/name", content)
        storage.write_whole(f"other/{writer}-{turn}", content[:800])
        seen = storage.read("same/name")
        assert seen == seen[:8] * 2**16
        assert storage.read(f"other/{writer}-{turn}") == content[:800]


def test_writers_at_the_same_time_leave_whole_files(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storages = [opened(kind, tmp_path, request) for kind in SHARED]
    running = [SPAWN.Process(target=write_in_turn, args=(storages, writer)) for writer in (0, 1)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    others = [f"other/{writer}-{turn}" for writer in (0, 1) for turn in range(TURNS)]
    for storage in storages:
        assert held(storage) == [*sorted(others), "same/name"]
        last = int.from_bytes(storage.read("same/name")[:8], "little")
        assert last in (TURNS - 1, 1000 + TURNS - 1), "the last of one of them"


def drive(storages: Sequence[Storage], driver: int) -> None:
    """Use the stores as a sweep does, while another driver does the same."""
    import torch

    from mlprune.pruning.moments import Moments
    from mlprune.storage.moments import MomentStore
    from mlprune.storage.results import Result, ResultStore

    for turn, storage in itertools.product(range(TURNS), storages):
        moments, results = MomentStore(storage, "model", "float32"), ResultStore(storage)
        layer = {"q": Moments(turn, torch.full((20_000,), turn, dtype=torch.float64))}
        moments.save("set", turn, layer)
        found = moments.load("set", turn)
        assert found is not None
        assert torch.equal(found["q"].sumsq_I, layer["q"].sumsq_I)
        key = f"trial{turn % 4}"
        results.save(Result(key, None, {"seconds": float(driver)}), f"[{driver}]" * (10_000 + driver))
        assert results.load(key) is not None
        assert results.items(key) in ("[0]" * 10_000, "[1]" * 10_001)


def start_driving(storages: Sequence[Storage], started: Event, driver: int) -> None:
    import mlprune.storage.moments  # noqa: F401

    started.set()
    drive(storages, driver)


def test_two_sweeps_share_a_store(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """This process and another one."""
    from mlprune.storage.moments import MomentStore
    from mlprune.storage.results import ResultStore

    storages = [opened(kind, tmp_path, request) for kind in SHARED]
    started = SPAWN.Event()
    other = SPAWN.Process(target=start_driving, args=(storages, started, 1))
    other.start()
    assert started.wait(120)
    drive(storages, 0)
    other.join(120)
    assert other.exitcode == 0
    for storage in storages:
        moments, results = MomentStore(storage, "model", "float32"), ResultStore(storage)
        assert all(moments.load("set", turn) is not None for turn in range(TURNS))
        for key in ("trial0", "trial1", "trial2", "trial3"):
            found = results.load(key)
            assert found is not None
            driver = int(found.metrics["seconds"])
            assert results.items(key) == f"[{driver}]" * (10_000 + driver), "of the same driver"


# one driver per sweep

HOLD = """
import sys
from mlprune.storage.files import Storage
from mlprune.storage.lock import sweep_lock

with sweep_lock(Storage(sys.argv[1]), "abc"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the sweep abc."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_driver_is_refused(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for _ in range(2):
        message = refused(lambda: sweep_lock(storage, "abc").__enter__())
        assert f"already running (process {driver.pid} on {socket.gethostname()})" in str(message)
        assert "mlprune status" in str(message)
    with sweep_lock(storage, "another"):
        pass
    assert driver.communicate("go on\n")[0] == ""
    assert driver.returncode == 0
    for _ in range(2):
        with sweep_lock(storage, "abc"):
            assert json.loads(storage.read("locks/abc.json"))["pid"] == os.getpid()
            assert "already running" in str(refused(lambda: sweep_lock(storage, "abc").__enter__()))
    assert not storage.exists("locks/abc.json")


def test_a_killed_driver_releases_its_lock(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    driver.kill()
    driver.wait()
    storage = Storage(str(tmp_path))
    assert storage.exists("locks/abc.json")
    with sweep_lock(storage, "abc"):
        assert json.loads(storage.read("locks/abc.json"))["pid"] == os.getpid()


@pytest.mark.parametrize("note", ["", "[", "[]", "{}", '{"pid": "x", "host": 1}'])
def test_a_lock_does_not_depend_on_the_file_that_names_its_holder(note: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with sweep_lock(storage, "abc"):
        storage.write_whole("locks/abc.json", note.encode())
        assert "in another process" in str(refused(lambda: sweep_lock(storage, "abc").__enter__()))


def test_a_disk_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file would be used instead, and stay when its driver is killed."""
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOSYS))
    message = str(refused(lambda: sweep_lock(Storage(str(tmp_path)), "abc").__enter__()))
    assert message.startswith(f"storage: {tmp_path}: cannot be used: Function not implemented")


def test_a_failed_sweep_releases_its_lock(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), sweep_lock(storage, "abc"):
        raise KeyboardInterrupt
    with sweep_lock(storage, "abc"):
        pass


def test_an_object_store_has_no_lock() -> None:
    storage = Storage("memory://store/x")
    with sweep_lock(storage, "abc"), sweep_lock(storage, "abc"):
        assert held(storage) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux has /proc")
def test_a_storage_where_nothing_can_be_created_is_reported() -> None:
    lock = sweep_lock(Storage("/proc/none"), "key")
    with pytest.raises(StorageError, match=r"^storage: /proc/none: cannot be "), lock:
        pass
