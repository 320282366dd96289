"""What SECURITY.md promises: strangers' files run no code, no secret is written anywhere, every port is closed."""

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import grpc  # type: ignore[import-untyped]
import psutil
import pytest
import torch
import yaml
from datasets.packaged_modules.pandas import pandas
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from safetensors.torch import load_file

from mlprune import console
from mlprune.commands.prune import VariantOptions, select_run
from mlprune.data.code import open_code
from mlprune.data.corpora import open_corpus
from mlprune.data.questions import INFERENCE, SENTIMENT, open_questions
from mlprune.errors import CorpusError, ModelError, SpecError
from mlprune.models.hollow import LoadedPart, Span, load_hollow
from mlprune.models.offload_folder import OffloadFolder
from mlprune.models.source import find_model
from mlprune.models.zero import open_rendezvous
from mlprune.report.tables import show_tracking
from mlprune.runtime.connection import cluster_address
from mlprune.spec.loading import load_spec, parse_spec, read_yaml
from mlprune.spec.templates import check_template
from tests.test_sweep import spec as tiny_spec
from tests.test_urls import WITH_SECRETS, WITHOUT
from tests.tiny_models import source

SEARCH = {"score": ["magnitude"], "sparsity": [0.5]}
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def written(folder: Path, text: str) -> str:
    file = folder / "spec.yaml"
    file.write_text(text)
    return str(file)


def refused(folder: Path, values: Any, *assignments: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load_spec(written(folder, yaml.safe_dump({"search": SEARCH, **values})), assignments)
    assert "\n" not in str(caught.value)
    return caught.value


def taken(folder: Path, values: Any) -> Any:
    return load_spec(written(folder, yaml.safe_dump({"search": SEARCH, **values})))


# what a spec file may not grant

ASKED = [
    ("model.trust_remote_code", True),
    ("model.trust_remote_code", "yes"),  # which would be taken for true
    ("model.trust_remote_code", 1),
    ("model.allow_pickle", "on"),
    ("model.allow_pickle", True),
    ("evaluation.task_path", "/home/they/tasks"),
    ("evaluation.task_path", "their tasks; touch here"),
]


@pytest.mark.parametrize(("key", "value"), ASKED)
def test_no_file_lets_code_run(key: str, value: Any, tmp_path: Path) -> None:
    section, name = key.split(".")
    error = refused(tmp_path, {section: {name: value}})
    assert (error.key, error.value) == (key, repr(value))
    reason, settings = error.remedy.rsplit(" give: ", 1)
    assert "code of others" in reason
    # what it tells a person to type is one word of a shell, and then it is granted
    option, granted = shlex.split(settings)
    made = load_spec(str(tmp_path / "spec.yaml"), [granted])
    assert option == "--set"
    assert getattr(getattr(made, section), name) == (str(Path(value).absolute()) if "task" in key else True)


def test_each_key_is_granted_separately(tmp_path: Path) -> None:
    both = {"model": {"trust_remote_code": True, "allow_pickle": True}}
    assert refused(tmp_path, both, "model.trust_remote_code=true").key == "model.allow_pickle"
    assert refused(tmp_path, both, "model.allow_pickle=true").key == "model.trust_remote_code"
    assert refused(tmp_path, both, "model.path=x", "evaluation.task_path=x").key == "model.trust_remote_code"
    withdrawn = load_spec(str(tmp_path / "spec.yaml"), ["model={path: x}"])  # the file's section is gone
    assert not withdrawn.model.trust_remote_code
    assert not taken(tmp_path, {"model": {"trust_remote_code": False, "allow_pickle": False}}).model.allow_pickle
    ours = parse_spec({"search": SEARCH, **both})
    assert (ours.model.trust_remote_code, ours.model.allow_pickle) == (True, True)  # of our own making


# secrets, and where they go


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_a_password_in_a_spec_is_refused(uri: str, tmp_path: Path) -> None:
    for error in (
        refused(tmp_path, {"tracking": {"uri": uri}}),
        refused(tmp_path, {}, f"tracking.uri={uri}"),  # it would be logged with the spec
    ):
        assert error.key == "tracking.uri"
        assert "MLFLOW_TRACKING_PASSWORD" in error.remedy
        assert "hunter2" not in str(error)


@pytest.mark.parametrize("uri", WITHOUT)
def test_a_uri_without_a_password_is_accepted(uri: str, tmp_path: Path) -> None:
    assert taken(tmp_path, {"tracking": {"uri": uri}}).tracking.uri == uri


def test_a_uri_from_the_environment_may_have_a_password_and_is_not_displayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for uri in WITH_SECRETS[:4]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        made = taken(tmp_path, {})
        assert made.tracking_uri == uri
        assert "hunter2" not in made.yaml()
        with console.results.capture() as shown:
            show_tracking(made)
        assert "tracking " in shown.get()
        assert "hunter2" not in shown.get()


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_a_spec_file_cannot_send_credentials_to_its_own_server(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"tracking": {"uri": "https://theirs.example"}}
    assert taken(tmp_path, theirs).tracking.uri == "https://theirs.example"
    monkeypatch.setenv(name, "hunter2")
    error = refused(tmp_path, theirs)
    assert (error.key, "hunter2" in str(error)) == ("tracking.uri", False)
    assert load_spec(str(tmp_path / "spec.yaml"), ["tracking.uri=https://theirs.example"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://theirs.example")  # they are for that one
    assert taken(tmp_path, theirs)


# parsing


def test_a_few_anchors_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    for key in ("name: *a11", "model: *a11", "model: {trust_remote_code: *a11}", "search: {score: *a11}"):
        with pytest.raises(SpecError) as caught:
            load_spec(written(tmp_path, "\n".join([f"b: {{{lines[0]}}}", *lines[1:], key])))
        assert len(str(caught.value)) < 1000
    with pytest.raises(SpecError, match="not YAML"):
        load_spec(written(tmp_path, "name: " + "[" * 100_000))


@pytest.mark.parametrize(
    "slot", ["{text.__class__}", "{text[0]}", "{text!r}", "{text:{language}}", "{text:>999999999}", "{0}", "{}"]
)
def test_templates_cannot_access_attributes(slot: str) -> None:
    for template in (slot, "{text}" + slot, "{language}: " + slot):
        with pytest.raises(SpecError, match=r"^calibration\.template: "):
            check_template(template, "calibration.template", needed=["text"], optional=["language"])


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The folder that untrusted code would create, if it ran."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "code ran"


def model(folder: Path, mark: Path, **config: Any) -> Path:
    """A copy of a model, with a module beside it that must not be imported."""
    made = folder / f"model-{len(list(folder.iterdir()))}"
    shutil.copytree(source().folder, made)
    values = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(values | config))
    (made / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    return made


def loaded(folder: Path, allow_pickle: bool = False) -> None:
    found = find_model(str(folder), allow_pickle=allow_pickle)
    found.fingerprint()
    found.tokenizer()
    load_hollow(found, LoadedPart.whole(Span(0, 4, 4)), torch.float32)


def test_a_strangers_model_runs_no_code(tmp_path: Path, mark: Path) -> None:
    theirs = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    loaded(model(tmp_path, mark, auto_map=theirs))  # it is a llama all the same
    tokenizer = model(tmp_path, mark)
    settings = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    unknown = model(tmp_path, mark, auto_map=theirs, model_type="evil")
    kernel = model(tmp_path, mark, _attn_implementation="somebody/kernel")
    adapter = model(tmp_path, mark)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    for folder in (tokenizer, unknown, kernel, adapter):
        with pytest.raises(ModelError, match=r"^model\.path: "):
            loaded(folder)


def test_weights_that_are_pickled_are_not_read(tmp_path: Path, mark: Path) -> None:
    beside, named, indexed, plain = (model(tmp_path, mark) for _ in range(4))
    torch.save(Bomb(mark), beside / "pytorch_model.bin")
    loaded(beside)  # the safetensors are
    torch.save(Bomb(mark), named / "model.safetensors")
    (indexed / "model.safetensors").unlink()
    torch.save(Bomb(mark), indexed / "weights.bin")
    names = dict.fromkeys(load_file(source().folder / "model.safetensors"), "weights.bin")
    (indexed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (plain / "model.safetensors").unlink()
    torch.save(Bomb(mark), plain / "pytorch_model.bin")
    for folder in (named, indexed, plain):
        with pytest.raises(ModelError, match=r"^model\.path: "):
            loaded(folder)
    with pytest.raises(pickle.UnpicklingError):  # granted, it is unpickled by torch's own list of what is data
        loaded(plain, allow_pickle=True)


def test_a_strangers_corpus_runs_no_code(tmp_path: Path, mark: Path) -> None:
    script = tmp_path / "corpus"
    script.mkdir()
    (script / "corpus.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (script / "train.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"en": ["a"], "fr": ["b"]}).save_to_disk(str(saved))
    state = json.loads((saved / "state.json").read_text())
    state |= {"_format_type": "custom", "_format_kwargs": {"transform": "os.system"}}
    (saved / "state.json").write_text(json.dumps(state))
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 200_000)
    long = tmp_path / "long.jsonl"
    long.write_text('{"en": ' + "1" * 5000 + "}")
    assert open_corpus(str(saved), ["en"]).lines["en"] == ("a",)  # as it is, whatever it would be formatted as
    for place in (script, script / "corpus.py", deep, long):
        with pytest.raises(CorpusError, match=r"^calibration\.corpus: "):
            open_corpus(str(place), ["en", "fr"])


def unpickle(_: object, files: Any) -> Iterator[tuple[int, object]]:
    """Read as the builder `pandas` did in the versions of datasets before 5.2."""
    for number, file in enumerate(files):
        yield number, pickle.loads(Path(file).read_bytes())  # noqa: S301


@pytest.mark.filterwarnings("ignore:The Pandas builder is deprecated:FutureWarning")
@pytest.mark.parametrize("folder", [None, "pandas", "json"])
def test_the_builders_of_datasets_are_no_datasets(
    folder: str | None, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pandas.Pandas, "_generate_tables", unpickle)
    place = tmp_path / (folder or ".")
    place.mkdir(exist_ok=True)
    for name in ("train", "test"):
        (place / f"{name}.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("pandas", "json", "csv", "parquet", "text", "webdataset"):
        for where in (name, f"{name}@train", f"{name}:en"):
            if where == folder:
                continue
            with pytest.raises(CorpusError, match=f"^calibration.corpus: '{where}': is a file format "):
                open_corpus(where, ["en"])
            with pytest.raises(CorpusError, match=f"^calibration.code: '{where}': is a file format "):
                open_code(where)
    for key, form in (("evaluation.xnli", INFERENCE), ("evaluation.reviews", SENTIMENT)):
        with pytest.raises(CorpusError, match=rf"^{key}.data: 'parquet': en: is a file format "):
            open_questions("parquet", "en", form, None, key)
    with pytest.raises(CorpusError, match="csv: is a file format "):
        open_questions("{language}", "csv", INFERENCE, None, "evaluation.xnli")  # a language of Myanmar


# a sweep, while it runs and after it

NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "MY_SECRET"),
)
MARKED = {name: f"marked-{number}-{name.lower()}" for number, name in enumerate(NAMES)}


@dataclass
class Seen:
    """What was observed of a sweep from outside."""

    folder: Path
    outcome: Any = None
    listening: set[tuple[str, str]] = field(default_factory=set)  # the process's name, the address
    answers: dict[str, Any] = field(default_factory=dict)  # of its Ray, by what token was given
    sockets: dict[str, bool] = field(default_factory=dict)  # folder -> whether others may enter it
    logged: dict[str, str] = field(default_factory=dict)  # secret -> a file of Ray's own that holds it
    ray_files: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Run one sweep on two actors, and observe it from outside all the time."""
    folder = tmp_path_factory.mktemp("seen")
    place = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path has 107 bytes at most
    place.chmod(0o755)
    found = Seen(folder)
    victim = folder / "store" / "tiny.png"
    victim.parent.mkdir()
    (folder / "mine.txt").write_text("mine")
    victim.symlink_to(folder / "mine.txt")
    search = {"calibration": ["mono:en"], "score": ["wanda"], "sparsity": [0.5], "propagation": ["dense"]}
    command = [sys.executable, "-m", "mlprune", "sweep", str(tiny_spec(folder, **search)), "--json", "out.json"]
    environment = {**os.environ, **MARKED, "RAY_TMPDIR": str(place)}
    environment = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--set", "pipeline.shards=2"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        while process.poll() is None:
            _look_at_ports(psutil.Process(process.pid), found)
            _look_at_files(place, found)
            time.sleep(1)
        assert process.returncode == 0, (folder / "log.txt").read_text()
        found.outcome = json.loads((folder / "out.json").read_text())
        yield found
    finally:
        process.kill()
        shutil.rmtree(place, ignore_errors=True)


def _look_at_ports(driver: psutil.Process, found: Seen) -> None:
    for process in _tree(driver):
        try:
            name, connections = process.name(), process.net_connections("inet")
        except psutil.Error:  # it has ended
            continue
        ports = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
        found.listening |= {(name, one.laddr.ip) for one in connections if one.status == psutil.CONN_LISTEN}
        if name == "gcs_server" and ports and not found.answers:
            found.answers = {token: _ask(min(ports), token) for token in ("", "0" * 64)}
            found.answers |= {"its own": _ask(min(ports), process.environ().get("RAY_AUTH_TOKEN", ""))}


def _look_at_files(place: Path, found: Seen) -> None:
    """Read Ray's own files, which it deletes after the sweep."""
    # os.walk, because Path.rglob raises for a folder that is deleted meanwhile
    for folder, folders, files in os.walk(place):
        for file in (Path(folder, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                _look_at_file(place, file, found)


def _look_at_file(place: Path, file: Path, found: Seen) -> None:
    if file.name == "sockets":
        above = [one for one in file.parents if place in one.parents]
        found.sockets[str(file)] = all(one.stat().st_mode & 0o077 for one in above)
    if file.is_file() and not file.is_symlink():
        found.ray_files.add(file.name)
        text = file.read_bytes()
        found.logged |= {name: str(file) for name, value in MARKED.items() if value.encode() in text}


def _tree(driver: psutil.Process) -> list[psutil.Process]:
    try:
        return [driver, *driver.children(recursive=True)]
    except psutil.Error:
        return []


def _ask(port: int, token: str) -> Any:
    """Return the answer of Ray's control service to a request for its nodes."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        given = [("authorization", f"Bearer {token}")] if token else []
        try:
            service.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=10, metadata=given)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_a_sweep_listens_on_loopback_alone(seen: Seen) -> None:
    assert {"gcs_server", "raylet"} < {name for name, _ in seen.listening}
    assert {one for one in seen.listening if one[1] not in LOOPBACK} == set()


def test_ray_requires_the_token(seen: Seen) -> None:
    unknown = grpc.StatusCode.UNAUTHENTICATED
    assert seen.answers == {"": unknown, "0" * 64: unknown, "its own": grpc.StatusCode.OK}


def test_other_users_cannot_enter_rays_folder(seen: Seen) -> None:
    assert seen.sockets
    assert not any(seen.sockets.values()), seen.sockets


def test_no_secret_of_the_environment_is_in_any_file(seen: Seen) -> None:
    assert {"gcs_server.out", "raylet.out"} <= seen.ray_files
    assert seen.logged == {}
    files = [file for file in seen.folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"mlflow.db", "spec.yaml", "environment.txt", "log.txt", "out.json"} <= names
    for file in files:
        text = file.read_bytes()
        assert [name for name, value in MARKED.items() if value.encode() in text] == [], file


def test_nothing_is_written_through_a_link_in_the_storage(seen: Seen) -> None:
    assert (seen.folder / "mine.txt").read_text() == "mine"
    assert (seen.folder / "store" / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_pruning_a_strangers_run_grants_nothing_more(seen: Seen) -> None:
    storage = f"storage={seen.folder / 'store'}"
    (file,) = (seen.folder / "store").rglob("spec.yaml")
    logged = read_yaml(file.read_text())
    theirs = logged | {"model": logged["model"] | {"allow_pickle": True}}
    file.write_text(yaml.safe_dump(theirs))
    with pytest.raises(SpecError) as caught:
        select_run(seen.outcome["winner"], VariantOptions(), {}, [storage])
    assert str(caught.value).startswith("model.allow_pickle: True: ")
    assert str(caught.value).endswith("--set model.allow_pickle=true")
    made, _ = select_run(seen.outcome["winner"], VariantOptions(), {}, [storage, "model.allow_pickle=true"])
    assert made.model.allow_pickle
    for text in ("- a", "a: [", "!!python/object/apply:os.getcwd []"):
        file.write_text(text)
        with pytest.raises(SpecError, match=r"^--run: "):
            select_run(seen.outcome["winner"], VariantOptions(), {}, [storage])


# other users of the same machine


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files of others'")
def test_the_ray_of_another_user_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("10.0.0.1:6379")
    assert cluster_address() == "10.0.0.1:6379"
    os.chown(file, 12345, 12345)  # everybody may write to Ray's folder
    assert cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address() == "10.0.0.1:6379"


def test_other_files_in_the_offload_folder_are_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "shard-00" / "weights"
    theirs.parent.mkdir()
    theirs.write_text("a lot of work")
    (tmp_path / "lock").write_text("a lock of theirs")
    own = OffloadFolder(tmp_path)
    assert tmp_path in own.path.parents
    own.close()
    assert theirs.read_text() == "a lot of work"
    assert (tmp_path / "lock").read_text() == "a lock of theirs"


def test_ranks_connect_on_loopback() -> None:
    store, address = open_rendezvous("127.0.0.1", 2)
    port = int(address.rpartition(":")[2])
    listening = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert {one.ip for one in listening if one.port == port} <= set(LOOPBACK)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    store.set("a", "b")
    assert store.get("a") == b"b"
