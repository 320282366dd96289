"""The spec of a sweep: its defaults, every mistake in one line, `--set`, and what its key follows."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mlprune.errors import SpecError
from mlprune.spec import loading as specs
from mlprune.spec.loading import apply_assignments, load_spec, parse_spec, read_yaml, to_assignments
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Pattern, Scoring

BASE = {"search": {"score": ["wanda"], "sparsity": [0.5], "calibration": ["mono:en"]}}


def spec(*assignments: str) -> SweepSpec:
    return parse_spec(apply_assignments(BASE, assignments))


def refused(*assignments: str) -> SpecError:
    """The error with which the assignments are refused: one line, and the same after a pickle."""
    with pytest.raises(SpecError) as caught:
        spec(*assignments)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    return caught.value


def test_every_key_but_search_has_a_default() -> None:
    made = parse_spec({"search": {"score": ["magnitude"], "sparsity": [0.5]}})
    assert read_yaml(made.yaml()) == {
        "name": "sweep",
        "model": {
            "path": "demo",
            "dtype": "auto",
            "revision": None,
            "trust_remote_code": False,
            "allow_pickle": False,
        },
        "pipeline": {
            "shards": "auto",
            "residency": "auto",
            "offload": None,
            "offload_folder": None,
            "ranks_per_shard": 1,
            "replicas": 1,
            "wait_minutes": None,
            "worker_memory": None,
        },
        "calibration": {
            "corpus": "sample",
            "samples": 32,
            "shots": 4,
            "max_tokens": 256,
            "seed": 0,
            "template": "{language}: {text}",
            "separator": None,
            "count_padding": False,
            "code": "stdlib",
        },
        "search": {
            "pretraining": None,
            "calibration": [],
            "mixture": [],
            "score": ["magnitude"],
            "sparsity": [0.5],
            "pattern": ["unstructured"],
            "allocation": ["uniform"],
            "propagation": ["sequential"],
            "repair": ["none"],
            "seed": None,
            "samples": None,
            "searcher": "random",
            "objective": "mean",
            "screen": None,
            "racing": False,
        },
        "evaluation": {
            "perplexity": {"languages": ["en", "fr", "de"], "lines": 64, "confirmation_lines": None},
            "xnli": None,
            "reviews": None,
            "translation": None,
            "tasks": [],
            "task_path": None,
            "task_items": None,
        },
        "claims": [],
        "storage": str(Path("mlprune-store").absolute()),
        "tracking": {"uri": None, "experiment": None},
    }


def test_search_is_needed() -> None:
    with pytest.raises(SpecError, match=r"^search: missing required key$"):
        parse_spec({})
    with pytest.raises(SpecError, match=r"^search\.score: missing required key$"):
        parse_spec({"search": {"sparsity": [0.5]}})


UNKNOWN = [
    ("modle=demo", "modle: 'demo': unknown key; did you mean model?"),
    ("model.pth=x", "model.pth: 'x': unknown key; did you mean path?"),
    ("search.scores=[wanda]", "search.scores: ['wanda']: unknown key; did you mean score?"),
    ("evaluation.perplexity.lins=3", "evaluation.perplexity.lins: 3: unknown key; did you mean lines?"),
    ("tracking.zzz=1", "tracking.zzz: 1: unknown key; known here: uri, experiment"),
    (
        "evaluation.bleu=1",
        "evaluation.bleu: 1: unknown key; known here: perplexity, xnli, reviews, "
        "translation, tasks, task_path, task_items",
    ),
]


@pytest.mark.parametrize(("assignment", "line"), UNKNOWN)
def test_an_unknown_key_is_answered_with_a_near_one(assignment: str, line: str) -> None:
    assert str(refused(assignment)) == line


# assignment -> key, value and a word of the remedy
BAD = {
    "name=a b": ("name", "'a b'", "may have letters"),
    "name=../x": ("name", "'../x'", "may have letters"),
    "model=3": ("model", "3", ""),
    "model.path=3": ("model.path", "3", "text"),
    "model.dtype=int8": ("model.dtype", "'int8'", "'auto', 'float32', 'bfloat16' or 'float16'"),
    "pipeline.shards=0": ("pipeline.shards", "0", "a number from 1"),
    "pipeline.shards=many": ("pipeline.shards", "'many'", "or auto"),
    "pipeline.shards=2.5": ("pipeline.shards", "2.5", "or auto"),
    "pipeline.worker_memory=lots": ("pipeline.worker_memory", "'lots'", "must be a size, e.g. 16GiB"),
    "pipeline.worker_memory=0": ("pipeline.worker_memory", "0", "must be a size, e.g. 16GiB"),
    "pipeline.offload=tape": ("pipeline.offload", "'tape'", "'cpu' or 'nvme'"),
    "pipeline.ranks_per_shard=0": ("pipeline.ranks_per_shard", "0", "greater than or equal to 1"),
    "pipeline.residency=disk": ("pipeline.residency", "'disk'", "'resident' or 'zero'"),
    "calibration.samples=0": ("calibration.samples", "0", "greater than or equal to 1"),
    "calibration.shots=0": ("calibration.shots", "0", "greater than or equal to 1"),
    "calibration.max_tokens=1": ("calibration.max_tokens", "1", "greater than or equal to 2"),
    "calibration.seed=x": ("calibration.seed", "'x'", "integer"),
    "search=null": ("search", "None", ""),
    "search.score=[]": ("search.score", "[]", "must not be empty"),
    "search.sparsity=[]": ("search.sparsity", "[]", "must not be empty"),
    "search.sparsity=[0.5, 1.0]": ("search.sparsity[1]", "1.0", "sparsity must be in [0, 1)"),
    "search.sparsity=[-0.1]": ("search.sparsity[0]", "-0.1", "sparsity must be in [0, 1)"),
    "search.sparsity=[.nan]": ("search.sparsity[0]", "'.nan'", "number"),
    "search.sparsity=[50%]": ("search.sparsity[0]", "'50%'", "number"),
    "search.calibration=[mono:en, 'mono:xx']": ("search.calibration[1]", "'xx'", "not an ISO 639 code"),
    "search.pattern=['2:4', '4:2']": ("search.pattern[1]", "'4:2'", "write unstructured, n:m"),
    "search.propagation=[both]": ("search.propagation[0]", "'both'", "'sequential' or 'dense'"),
    "search.searcher=optuna": ("search.samples", "None", "write e.g. samples: 20"),
    "search.seed=[]": ("search.seed", "[]", "must not be empty"),
    "search.seed=[0.5]": ("search.seed[0]", "0.5", "valid integer"),
    "search.screen=0": ("search.screen", "0", "greater than or equal to 1"),
    "evaluation.perplexity.confirmation_lines=-1": (
        *("evaluation.perplexity.confirmation_lines", "-1", "greater than or equal to 0"),
    ),
    "evaluation.perplexity.languages=[en, xx]": ("evaluation.perplexity.languages[1]", "'xx'", "ISO 639"),
    "evaluation.perplexity.languages=[]": ("evaluation.perplexity.languages", "[]", "must not be empty"),
    "evaluation.perplexity.lines=0": ("evaluation.perplexity.lines", "0", "greater than or equal to 1"),
    "storage=null": ("storage", "None", "text"),
    "tracking.uri=3": ("tracking.uri", "3", "text"),
}


@pytest.mark.parametrize(("assignment", "answer"), BAD.items())
def test_a_bad_value_is_answered_with_key_value_and_remedy(assignment: str, answer: tuple[str, str, str]) -> None:
    error = refused(assignment)
    assert (error.key, str(error.value)) == answer[:2]
    assert error.remedy
    assert answer[2] in error.remedy


@pytest.mark.parametrize(
    "assignment", ["search.sparsity=0.5", "search.score=wanda", "model=demo", "search.score=[]"]
)
def test_the_remedy_is_in_the_words_of_yaml(assignment: str) -> None:
    remedy = refused(assignment).remedy.lower()
    assert not any(word in remedy for word in ("tuple", "dictionary", "instance of", "validation"))


def test_set_reads_yaml_and_reaches_every_depth() -> None:
    made = spec(
        "evaluation.perplexity.lines=7",
        "search.sparsity=[0.1, 0.2]",
        "model.revision=null",
        "model.trust_remote_code=true",
        "tracking.uri=http://x/?a=b",
        "pipeline.shards=3",
    )
    assert made.evaluation.perplexity.lines == 7
    assert made.evaluation.perplexity.languages == ("en", "fr", "de")
    assert made.search.sparsity == (0.1, 0.2)
    assert made.search.score == (Scoring("wanda"),)
    assert (made.model.revision, made.model.trust_remote_code) == (None, True)
    assert made.tracking.uri == "http://x/?a=b"
    assert made.pipeline.shards == 3


def test_set_makes_sections_takes_the_last_and_leaves_its_input_alone() -> None:
    values = {"a": {"b": 1}, "c": 2}
    found = apply_assignments(values, ["a.d=3", "c=[x, {y: 1}]", "e.f.g=4", "e.f.g=5", "empty="])
    assert found == {"a": {"b": 1, "d": 3}, "c": ["x", {"y": 1}], "e": {"f": {"g": 5}}, "empty": None}
    assert values == {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize("assignment", ["name", "=3", "", "a..b=3", ".a=3", "a.=3"])
def test_set_of_a_wrong_form_is_answered(assignment: str) -> None:
    assert str(refused(assignment)) == f"--set: {assignment!r}: write key=value, e.g. pipeline.shards=3"


def test_set_of_a_value_that_is_no_yaml_is_answered() -> None:
    assert str(refused("name=[")) == "name: '[': the value is not YAML"


@pytest.mark.parametrize("text", ["!!int x", "!!timestamp x", "!!bool x", "{a: 1, a: 2}", "[" * 3000])
def test_a_value_that_yaml_cannot_construct_is_answered(text: str) -> None:
    refused(f"name={text}")


def test_options_become_assignments() -> None:
    found = to_assignments({"search.pattern": ["2:4"], "name": "null", "none": None, "calibration.seed": 0})
    assert found == ['search.pattern=["2:4"]', 'name="null"', "calibration.seed=0"]
    assert spec(*found).search.pattern == (Pattern(2, 4),)
    assert spec(*found).name == "null"


def test_norwegian_is_a_language_and_no_boolean() -> None:
    made = spec("evaluation.perplexity.languages=[no, en, no]", "search.calibration=[mono:no, translation:en-no]")
    assert made.evaluation.perplexity.languages == ("no", "en")
    words = ["no", "yes", "on", "off", "No", "y", True, False]
    assert read_yaml("[no, yes, on, off, No, y, true, False]") == words
    assert parse_spec(read_yaml(made.yaml())) == made


def test_a_pattern_needs_no_quotes() -> None:
    assert read_yaml("[unstructured, 2:4]") == ["unstructured", "2:4"]
    assert spec("search.pattern=[2:4]").search.pattern == (Pattern(2, 4),)


def test_no_tag_runs_code(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for tag in ("apply:os.mkdir", "apply:os.system", "new:os.mkdir"):
        file = tmp_path / "spec.yaml"
        file.write_text(f"name: !!python/object/{tag} ['{target}']\n")
        with pytest.raises(SpecError, match=r"^spec: .*: not YAML: could not determine a constructor"):
            load_spec(str(file))
        assert "not YAML" in str(refused(f"name=!!python/object/{tag} ['{target}']"))
    assert not target.exists()


def test_a_spec_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_spec("quickstart") == load_spec("quickstart.yaml") == load_spec("quickstart", ["name=quickstart"])
    assert load_spec("quickstart", ["name=other"]).name == "other"
    path = tmp_path / "spec.yaml"
    path.write_text("name: mine\nsearch: {score: [magnitude], sparsity: [0.5]}\n")
    assert load_spec(str(path)).name == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_spec("spec.yaml") == load_spec("./spec.yaml")
    for name in ("nowhere", "../nowhere.yaml", str(tmp_path)):
        with pytest.raises(SpecError, match=r"^spec: .*: no such file, and no sweep of that name; known: .*quick"):
            load_spec(name)


def test_a_spec_of_the_package_is_found_by_its_whole_path() -> None:
    assert load_spec(str(specs.sweeps_folder() / "quickstart.yaml")) == load_spec("quickstart")


@pytest.mark.parametrize("text", ["- a\n", "a", "", "a: [\n", "a: b: c\n", "\tname: x\n", "name: \xff\n"])
def test_a_file_that_is_no_mapping_is_answered_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SpecError, match=r"^spec: '.*': (not YAML: |a spec is a YAML mapping)") as caught:
        load_spec(str(file))
    assert "\n" not in str(caught.value)


COUNTS = [
    *["name=other", "model.path=x", "model.dtype=float32", "model.revision=v1", "model.trust_remote_code=true"],
    *["calibration.corpus=x", "calibration.samples=1", "calibration.shots=1", "calibration.max_tokens=9"],
    *["calibration.seed=1", "search.calibration=['mono:fr']", "search.score=[magnitude]"],
    *["search.sparsity=[0.4]", "search.pattern=['2:4']", "search.propagation=[dense]", "search.samples=3"],
    *["search.objective=worst", "evaluation.perplexity.languages=[en]", "evaluation.perplexity.lines=1"],
]
FREE = [
    "pipeline.shards=3",
    "pipeline.residency=resident",
    "storage=/x",
    "tracking.uri=y",
    "tracking.experiment=z",
]


def test_the_key_follows_what_is_computed_and_not_where() -> None:
    key = spec().key
    assert len(key) == 16
    assert {spec(assignment).key for assignment in FREE} == {key}
    assert len({key, *(spec(assignment).key for assignment in COUNTS)}) == 1 + len(COUNTS)


def test_the_spec_survives_being_written() -> None:
    for made in (spec(), spec(*COUNTS, *FREE), load_spec("quickstart")):
        again = parse_spec(read_yaml(made.yaml()))
        assert again == made
        assert again.key == made.key
        assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301


def test_where_things_are_kept_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert spec().storage_folder == tmp_path / "mlprune-store"
    assert spec("storage=~/x").storage == "/home/somebody/x"
    assert spec("storage=y").tracking_uri == f"sqlite:///{tmp_path}/y/mlflow.db"
    assert spec("tracking.uri=http://host").tracking_uri == "http://host"


def test_where_things_are_kept_when_the_storage_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = spec("storage=s3://bucket/a")
    assert made.storage == "s3://bucket/a"
    assert made.key == spec().key
    assert made.local_folder.parent == tmp_path / "mlprune"
    assert made.local_folder != spec("storage=s3://bucket/b").local_folder
    assert made.offload_folder == made.local_folder / "offload"
    assert spec().local_folder == spec().storage_folder
    with pytest.raises(SpecError, match=r"tracking.uri: sqlite cannot be at s3://bucket/a; name a server"):
        _ = made.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head")
    assert made.tracking_uri == spec().tracking_uri == "http://head"
    assert spec("tracking.uri=http://host").tracking_uri == "http://host"


@pytest.mark.parametrize("address", ["s3://KEY:ve/ry@bucket/x", "gs://bucket/x?token=very"])
def test_secrets_in_the_storage_are_refused_and_not_shown(address: str) -> None:
    told = str(refused(f"storage={address}"))
    assert "no secrets in specs" in told
    assert not any(word in told for word in ("KEY", "ry@", "very", "bucket"))


def sections(model: Any) -> list[Any]:
    return [
        model,
        *(s for value in dict(model).values() if hasattr(value, "model_fields_set") for s in sections(value)),
    ]


def test_the_spec_is_frozen_to_the_bottom() -> None:
    found = sections(spec())
    assert len(found) == 8
    for section in found:
        name, value = next(iter(dict(section).items()))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, value)
    assert hash(spec()) == hash(spec())  # plain, immutable values all through
