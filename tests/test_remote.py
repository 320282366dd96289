"""A sweep on a cluster, from a laptop: a real Ray head with its dashboard, job server and token authentication.

Two programs are replaced: `ssh`, by one that forwards ports to this machine's own (tests/test_hosts.py has the
real one), and in most tests the head's `mlprune`, by one that prints its arguments and behaves as the name of the
spec says.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

import mlprune
from mlprune.cli import main
from mlprune.remote import job_package
from mlprune.remote import jobs as remote
from mlprune.remote.job_package import JobPackage, package_job
from mlprune.remote.ssh import Head, Tunnel, find_head
from mlprune.spec.loading import load_spec

# Ray's launcher leaves the files that it reads to the garbage collector, and its client has an old habit
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file <_io.TextIOWrapper:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

SSH = """
import asyncio, json, os, subprocess, sys

home = os.environ["HEAD_HOME"]
ports = json.loads(os.environ["HEAD_PORTS"])  # of the head's loopback, and where they are here
if "no-key" in sys.argv:
    sys.exit("nobody@head: Permission denied (publickey).")
if "-N" not in sys.argv:
    sys.exit(subprocess.call(["bash", "-c", sys.argv[-1]], env={**os.environ, "HOME": home}))
with open(home + "/ssh.pid", "w") as file:
    file.write(str(os.getpid()))

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def forward(port, reader, writer):
    try:
        there, back = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return writer.close()
    await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

async def main():
    for argument in sys.argv:
        if argument.startswith("-L"):
            host, here, _, there = argument[2:].split(":")
            port = ports.get(there, 1)
            await asyncio.start_server(lambda r, w, port=port: forward(port, r, w), host, int(here))
    await asyncio.Event().wait()

asyncio.run(main())
"""
MLPRUNE = """
import json, os, pathlib, signal, sys, time, urllib.request

if sys.argv[1] == "--version":
    sys.exit(print("mlprune, version 0.0.1"))
if sys.argv[1] == "status":
    print("a table", file=sys.stderr)
    sys.exit(print(json.dumps({"sweeps": []}, indent=1)))
spec = pathlib.Path("sweep.yaml").read_text()
name = spec.split()[1]
home, result = pathlib.Path.home(), pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
print("given", sys.argv[1:-2])
if name == "mistake":
    sys.exit(print("mlprune: model.path: 'x': no such folder") or 2)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "failing":
    result.write_text(json.dumps({"failed": {"wanda 0.5": "no memory"}}))
    sys.exit(1)
if name == "stopped":
    request = urllib.request.Request(
        f"http://127.0.0.1:{os.environ['DASHBOARD']}/api/jobs/{result.stem}/stop", method="POST",
        headers={"Authorization": "Bearer " + (home / ".ray/auth_token").read_text()})
    urllib.request.urlopen(request)
    time.sleep(60)
if name == "slow" and "--dry-run" not in sys.argv:
    for number in range(40):
        print(f"line {number}.")
        while number == 20 and not (home / "go-on").exists():
            time.sleep(0.05)
        time.sleep(0.02)
files = {str(file): file.read_text() for file in pathlib.Path().rglob("*") if file.is_file()}
result.write_text(json.dumps({"files": files, "set": [a[6:] for a in sys.argv if a.startswith("--set=")],
                              "env": {key: os.environ.get(key) for key in ("COLUMNS", "PYTHONUNBUFFERED")}}))
"""
SPEC = """name: NAME
# a comment
search: {score: [magnitude], sparsity: [0.5]}
evaluation: {perplexity: {languages: [en, fr], lines: 3}}
"""


@dataclass(frozen=True)
class Lab:
    """A running head, and the files with which a laptop reaches it."""

    home: Path  # of the head and, because of the token, of the laptop
    file: Path  # of the cluster
    environment: dict[str, str]  # the laptop's


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def program(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!{sys.executable}{text}")
    file.chmod(0o755)


def cluster_file(folder: Path, name: str, **auth: str) -> Path:
    """A cluster of one machine that is up, according to the state of Ray's launcher."""
    file = folder / f"{name}.yaml"
    provider = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    values = {"cluster_name": name, "provider": provider, "auth": {"ssh_user": "nobody", **auth}}
    file.write_text(json.dumps(values))
    state = {"127.0.0.1": {"tags": {"ray-node-type": "head", "ray-node-status": "up-to-date"}, "state": "running"}}
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / f"cluster-{name}.state").write_text(json.dumps(state))
    return file


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], output: Path) -> Iterator[None]:
    """Run a process in its own session; at the end, kill it and all its children."""
    with output.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        psutil.wait_procs(family, 10)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="mlp"))  # short: Ray's sockets are in it
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a-token-of-32-characters-at-least")
    program(folder / "head" / "mlprune", MLPRUNE)
    program(folder / "laptop" / "ssh", SSH)
    gcs, dashboard, agent, client, metrics = free_ports(5)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    plain |= {"HOME": str(home), "PYTHONPATH": str(Path(mlprune.__file__).parents[1])}
    there = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "DASHBOARD": str(dashboard)}
    ray = f"""ray start --head --block --port {gcs} --dashboard-host 127.0.0.1 --dashboard-port {dashboard}
        --node-ip-address 127.0.0.1 --dashboard-agent-listen-port {agent} --ray-client-server-port {client}
        --metrics-export-port {metrics} --num-cpus 1 --object-store-memory 80000000 --temp-dir {folder}/r"""
    here = {"RAY_TMPDIR": str(folder), "HEAD_HOME": str(home), "HEAD_PORTS": json.dumps({"8265": dashboard})}
    laptop = plain | here | {"PATH": f"{folder}/laptop:{path}", "RAY_ADDRESS": "http://127.0.0.1:1"}
    with running(shlex.split(ray), plain | there | {"PATH": f"{folder}/head:{path}"}, folder / "ray.log"):
        yield Lab(home, cluster_file(folder, "lab"), laptop)
    shutil.rmtree(folder)


@pytest.fixture
def laptop(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs mlprune as on the laptop, in its own folder."""
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(lab.environment):
        monkeypatch.delenv(name)
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    return run


def write_spec(name: str, more: str = "") -> str:
    Path("spec.yaml").write_text(SPEC.replace("NAME", name) + more)
    return "spec.yaml"


def test_attach_without_a_sweep(lab: Lab, laptop: Callable[..., Result]) -> None:
    """The first test: the cluster has seen no sweep yet."""
    done = laptop("sweep", "--attach", "--cluster", str(lab.file))
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"mlprune: --attach: '{lab.file}': no sweep was sent to this cluster"
    )


def test_a_sweep_is_sent_watched_and_its_result_fetched(lab: Lab, laptop: Callable[..., Result]) -> None:
    """Files on the laptop are sent whole; other paths are the cluster's."""
    text = {"corpus/en.txt": "One\n", "corpus/.gitignore": "*\n", "corpus/.venv/fr.txt": "Une\n", "code.py": "1\n"}
    for name, content in text.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    spec = write_spec("plain", "calibration: {code: code.py}\nstorage: runs\npipeline: {offload_folder: /disk}\n")
    options = ("--corpus", "corpus", "--set", "model.path=/models/big one", "--json", "out.json")
    done = laptop("sweep", spec, "--cluster", str(lab.file), *options)
    assert done.exit_code == 0, done.output
    result = json.loads(Path("out.json").read_text())
    sent = {f"calibration.corpus/{name}": content for name, content in text.items() if name != "code.py"}
    assert result["files"] == {"sweep.yaml": Path(spec).read_text(), "calibration.code/code.py": "1\n", **sent}
    *from_options, corpus, code, storage = result["set"]
    assert from_options == ['calibration.corpus="corpus"', "model.path=/models/big one"]
    assert corpus == 'calibration.corpus="calibration.corpus/corpus"'
    assert code == 'calibration.code="calibration.code/code.py"'
    assert storage == 'storage="~/runs"'
    assert result["env"] == {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    assert done.stdout.count("given [") == 1
    assert f"mlprune sweep --attach --cluster {lab.file}" in done.stderr
    assert "0.0.1 on the cluster" in done.stderr, "the cluster has another version of mlprune"
    assert (lab.home / ".ray/auth_token").read_text() not in done.output
    assert not psutil.pid_exists(int((lab.home / "ssh.pid").read_text())), "the tunnel was not closed"


def test_the_exit_code_is_that_of_the_job(lab: Lab, laptop: Callable[..., Result]) -> None:
    codes = {"mistake": 2, "killed": 137, "stopped": 1}
    with remote.connect(str(lab.file)) as cluster:
        sent = [package_job(file := write_spec(name), load_spec(file), [], False) for name in codes]
        jobs = [cluster.start(one) for one in sent]  # at the same time
        assert [cluster.watch(job) for job in jobs] == [(code, None) for code in codes.values()]


def test_a_sweep_with_failed_trials_has_a_result(lab: Lab, laptop: Callable[..., Result]) -> None:
    done = laptop("sweep", write_spec("failing"), "--cluster", str(lab.file), "--json", "out.json")
    assert done.exit_code == 1, done.output
    assert json.loads(Path("out.json").read_text()) == {"failed": {"wanda 0.5": "no memory"}}


def wait_for(text: str, file: Path) -> None:
    deadline = time.monotonic() + 30
    while text not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.05)


def test_a_killed_client_leaves_the_job_running(lab: Lab, laptop: Callable[..., Result]) -> None:
    """The same sweep, sent again, attaches to the job; the tunnel breaks; every line is printed once."""
    command = [sys.executable, "-m", "mlprune", "sweep", write_spec("slow"), "--cluster", str(lab.file)]

    def start(output: str) -> subprocess.Popen[bytes]:
        with Path(output).open("w") as file:
            return subprocess.Popen(command, stdout=file, stderr=file)

    with start("first") as first:
        wait_for("line 5.", Path("first"))
        ssh = psutil.Process(int((lab.home / "ssh.pid").read_text()))
        first.kill()
    ssh.wait(5)  # it ends with its client
    with start("second") as second:
        wait_for("line 20.", Path("second"))
        broken = int((lab.home / "ssh.pid").read_text())
        os.kill(broken, signal.SIGKILL)
        wait_for("lost the connection", Path("second"))
        dry = laptop("sweep", "spec.yaml", "--cluster", str(lab.file), "--dry-run", "--json", "-")
        (lab.home / "go-on").touch()
        assert second.wait(30) == 0
    assert "is already running" not in Path("first").read_text()
    text = Path("second").read_text()
    assert text.count("is already running") == 1
    lines = [line for line in text.splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}." for number in range(40)]
    assert dry.exit_code == 0
    assert "is already running" not in dry.output
    assert list(json.loads(dry.stdout)["files"]) == ["sweep.yaml"]
    again = laptop("sweep", "--attach", "--cluster", str(lab.file))  # it has ended, and is the last
    assert again.exit_code == 0
    assert [line for line in again.stdout.splitlines() if line.startswith("line ")] == lines


def test_the_sweep_is_the_same_on_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded on the cluster, the spec differs only in the paths of files."""
    (tmp_path / "laptop").mkdir()
    monkeypatch.chdir(tmp_path / "laptop")
    Path("words.txt").write_text("One\n")
    file = write_spec("same", 'storage: runs\nmodel: {path: "it\'s a model"}\n')
    options = [
        "calibration.corpus=words.txt",
        'search.calibration=["mono:en", "mono:no"]',
        "calibration.samples=7",
    ]
    spec = load_spec(file, options)
    package = package_job(file, spec, options, True)
    package.pack(tmp_path / "sweep.zip")
    command = package.entrypoint("id").partition("exec ")[2]
    shutil.unpack_archive(tmp_path / "sweep.zip", tmp_path / "head")
    monkeypatch.chdir(tmp_path / "head")
    mlprune, sweep, name, *rest = shlex.split(command)
    assert (mlprune, sweep, rest[-3:]) == ("mlprune", "sweep", ["--dry-run", "--json", "~/.mlprune/jobs/id.json"])
    there = load_spec(name, [option.removeprefix("--set=") for option in rest[:-3]])
    assert Path(there.calibration.corpus).read_text() == "One\n"
    places = {"storage": there.storage, "calibration": there.calibration}
    assert there.storage == str(Path.home() / "runs")
    assert there == spec.model_copy(update=places)
    corpus = {"corpus": there.calibration.corpus}
    assert there.calibration == spec.calibration.model_copy(update=corpus)


def test_status_of_the_head(lab: Lab, laptop: Callable[..., Result]) -> None:
    """What a login prints is left out; the table is printed, and the values are returned."""
    (lab.home / ".bashrc").write_text(f"echo Welcome; export PATH={lab.file.parent}/head:$PATH")
    done = laptop("status", "--cluster", str(lab.file), "--json", "out.json")
    assert (done.exit_code, done.stdout) == (0, "a table\n")
    assert json.loads(Path("out.json").read_text()) == {"sweeps": []}


def refused(done: Result, *words: str) -> None:
    """Check that the command failed with one line that contains these words."""
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mlprune: ")]
    assert done.stderr.endswith(line + "\n")
    for word in words:
        assert word in line


def test_mistakes_are_one_line(lab: Lab, laptop: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = write_spec("plain"), lab.file.parent
    refused(laptop("sweep", spec, "--cluster", "no.yaml"), "--cluster: 'no.yaml': no such file")
    for text, word in (
        ("a: [", "not YAML"),
        ("[1]", "cluster_name"),
        ("cluster_name: x", "provider"),
        ("cluster_name: !!python/object/apply:os.system ['touch ran']\nprovider: {}", "not YAML"),
    ):
        Path("bad.yaml").write_text(text)
        refused(laptop("sweep", spec, "--cluster", "bad.yaml"), "--cluster: 'bad.yaml'", word)
    assert not Path("ran").exists()
    refused(laptop("sweep", "nosweep", "--cluster", str(lab.file)), "spec: 'nosweep'")
    refused(laptop("sweep", spec, "--attach", "--cluster", str(lab.file)), "--attach")
    refused(laptop("sweep", "--attach"), "--attach", "--cluster FILE")
    down = cluster_file(folder, "down file")
    (folder / "ray" / "cluster-down file.state").unlink()
    refused(laptop("sweep", spec, "--cluster", str(down)), "not up", f"ray up '{down}'")
    keyless = cluster_file(folder, "keyless", ssh_private_key="no-key")
    refused(laptop("sweep", spec, "--cluster", str(keyless)), "Permission denied (publickey)", "127.0.0.1")
    monkeypatch.setenv("HOME", str(folder))
    refused(laptop("sweep", spec, "--cluster", str(lab.file)), "auth_token", "ray get-auth-token --generate")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("some-other-cluster's-token-of-more-than-32")
    refused(laptop("sweep", spec, "--cluster", str(lab.file)), "not this cluster's token")


def test_a_head_without_ray_is_named(
    lab: Lab, laptop: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEAD_PORTS", "{}")
    monkeypatch.setattr(remote, "START_SECONDS", 1)
    done = laptop("sweep", "--attach", "--cluster", str(lab.file))
    assert done.exit_code == 1
    assert "the job server of 127.0.0.1 does not answer" in done.stderr.splitlines()[-1]
    assert f"ray up {lab.file}" in done.stderr.splitlines()[-1]


def test_files_that_are_too_large_to_be_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sizes are added up; the key that exceeds the limit is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_package, "MAX_BYTES", 1024)
    for name, size in (("corpus", 600), ("code", 400)):
        Path(name).mkdir()
        Path(name, "text").write_bytes(bytes(size))
    spec, options = write_spec("large"), ("calibration.corpus=corpus", "calibration.code=code")
    package_job(spec, load_spec(spec, options), options, False)
    Path("code", "more").write_bytes(bytes(100))
    with pytest.raises(mlprune.errors.SpecError) as caught:
        package_job(spec, load_spec(spec, options), options, False)
    assert str(caught.value).startswith(
        f"calibration.code: '{tmp_path}/code': 500 B, but at most 1 KiB can be sent in all"
    )


def test_specs_with_secrets_are_not_sent(laptop: Callable[..., Result], lab: Lab) -> None:
    spec = write_spec("secret", "tracking: {uri: 'http://me:hunter2@host:5000'}\n")
    done = laptop("sweep", spec, "--cluster", str(lab.file))
    refused(done, "tracking.uri", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    assert "hunter2" not in done.output


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        ({}, ['storage="~/mlprune-store"']),
        ({"storage": "~/runs"}, []),
        ({"storage": "/data/runs"}, []),
        ({"storage": "s3://bucket/runs"}, []),
        ({"storage": "../runs", "pipeline": {"offload_folder": "disk"}},
         ['storage="~/../runs"', 'pipeline.offload_folder="~/disk"']),
    ],
)  # fmt: skip
def test_folders_that_outlive_the_job(given: dict[str, object], moved: list[str]) -> None:
    """Anything that a job writes beside its spec is deleted with the job's folder."""
    text = SPEC.replace("NAME", "x") + json.dumps(given)[1:-1].replace(', "pipeline"', '\n"pipeline"') + "\n"
    assert JobPackage(load_spec("quickstart"), text, ()).job_assignments() == moved


def test_the_ssh_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Key, user, proxy and container come from the cluster file."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = cluster_file(tmp_path, "pc", ssh_private_key="~/key", ssh_proxy_command="nc %h %p")
    values = json.loads(file.read_text())
    image = {"image": "ray", "container_name": "ray_box"}
    file.write_text(json.dumps({**values, "docker": image}))
    head = find_head(str(file))
    assert (head.address, head.container) == ("127.0.0.1", ("docker", "exec", "ray_box"))
    assert head.ssh[:3] == ("ssh", "-i", "~/key")
    assert "-oProxyCommand=nc %h %p" in head.ssh
    assert head.ssh[-1] == "nobody@127.0.0.1"


TUNNEL = """
import sys, time
from mlprune.remote.ssh import Head, Tunnel
tunnel = Tunnel(Head("x.yaml", "head", (sys.argv[1],), ()), (8265,))
print("up", flush=True)
time.sleep(60)
"""


def test_a_tunnel_ends_with_a_client_that_is_killed(tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    sleeper.chmod(0o755)
    command = [sys.executable, "-c", TUNNEL, str(sleeper)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        deadline = time.monotonic() + 10
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
        ssh = psutil.Process(int((tmp_path / "pid").read_text()))
        time.sleep(0.5)
        assert ssh.is_running()
        client.kill()
    ssh.wait(5)


def test_a_tunnel_that_ended_is_opened_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    once = tmp_path / "once"
    once.write_text(f"#!/bin/sh\necho started >>{starts}\n[ $(wc -l <{starts}) = 1 ] || exec sleep 60\n")
    once.chmod(0o755)
    tunnel = Tunnel(Head("x.yaml", "head", (str(once),), ()), (8265,))
    deadline = time.monotonic() + 10
    while not starts.exists() or starts.read_text().count("started") < 2:
        tunnel.reconnect()
        time.sleep(0.05)
        assert time.monotonic() < deadline
    for _ in range(5):  # it runs: nothing to do
        tunnel.reconnect()
        time.sleep(0.05)
    tunnel.close()
    assert starts.read_text().count("started") == 2


STOLEN = """#!{python}
import pathlib, socket, sys, time
starts = pathlib.Path({starts!r})
with starts.open("a") as log:
    log.write("started\\n")
if starts.read_text().count("started") == 1:
    sys.exit("bind [127.0.0.1]:8265: Address already in use\\nCould not request local forwarding.")
forward = next(word for word in sys.argv if word.startswith("-L127.0.0.1:"))
place = socket.create_server(("127.0.0.1", int(forward.split(":")[1])))
time.sleep(60)
"""


def test_a_port_that_was_taken_is_replaced(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(STOLEN.format(python=sys.executable, starts=str(tmp_path / "starts")))
    ssh.chmod(0o755)
    tunnel = Tunnel(Head("x.yaml", "head", (str(ssh),), ()), (8265,))
    try:
        tunnel.open()
        socket.create_connection(("127.0.0.1", tunnel.ports[0]), 1).close()
    finally:
        tunnel.close()
    assert (tmp_path / "starts").read_text().count("started") == 2
