"""Values of a spec that no file system, database or terminal can take are refused in one short line."""

from pathlib import Path

import pytest

from mlprune.data.corpora import open_corpus
from mlprune.errors import CorpusError, SpecError, UserError
from mlprune.spec.limits import PATHS
from mlprune.spec.loading import load_spec, to_assignments

NAME = "x" * 256
SECTIONS = {
    "evaluation.xnli.data": {"evaluation.xnli.languages": ["en"]},
    "evaluation.reviews.data": {"evaluation.reviews.languages": ["en"]},
}


def refused(key: str, value: object, words: str) -> None:
    settings = {**SECTIONS.get(key, {}), key: value}
    with pytest.raises(SpecError) as caught:
        load_spec("quickstart", to_assignments(settings))
    line = str(caught.value)
    assert line.startswith(f"{key}: ")
    assert words in line
    assert line.isprintable()
    assert len(line) < 400


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", [NAME, f"a/{NAME}/b", "y/" * 3000])
def test_long_paths_are_refused(key: str, value: str) -> None:
    refused(key, f"sqlite:///{value}" if key == "tracking.uri" else value, "is too long")


@pytest.mark.parametrize("key", [*PATHS, "name", "model.revision", "tracking.experiment", "calibration.template"])
@pytest.mark.parametrize("char", ["\0", "\x1b", "\r"])
def test_control_characters_are_refused(key: str, char: str) -> None:
    refused(key, f"a{char}b", "letters" if key == "name" else "control character")


def test_line_ends_are_allowed_in_templates() -> None:
    text = "{text}\n\t{language}"
    spec = load_spec("quickstart", to_assignments({"calibration.template": text, "calibration.separator": "\n"}))
    assert spec.calibration.template == text


@pytest.mark.parametrize("key", ["storage", "pipeline.offload_folder", "evaluation.task_path"])
def test_folders_that_cannot_be_resolved_are_refused(key: str) -> None:
    refused(key, "~no-such-user/x", "names no user")
    refused(key, " ", "must not be empty")


@pytest.mark.parametrize("uri", ["http://[::1", "mysql://[", "http://a:99999999", "https://a:b"])
def test_invalid_urls_are_refused(uri: str) -> None:
    refused("tracking.uri", uri, "not a URL")


def test_an_invalid_url_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidden@[::1")
    with pytest.raises(SpecError) as caught:
        load_spec("quickstart")
    assert str(caught.value) == "MLFLOW_TRACKING_URI: 'https://...': not a URL: its host or port is invalid"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("name", "", "letters, digits"),
        ("name", "x" * 201, "is too long"),
        ("name", "ü" * 101, "is too long"),
        ("tracking.uri", "", "must not be empty"),
        ("tracking.experiment", "", "must not be empty"),
        ("calibration.separator", "x" * 10**6, "is 1,000,000 characters"),
        ("calibration.seed", 2**63, "must be at most"),
        ("pipeline.ranks_per_shard", 10**9, "less than or equal to 1024"),
        ("pipeline.replicas", 10**9, "less than or equal to 1024"),
        ("pipeline.wait_minutes", 1e300, "less than or equal to 525600"),
        ("calibration.samples", 10**18, "less than or equal to 1000000"),
        ("search.screen", 10**24, "less than or equal to 1000000"),
        ("evaluation.perplexity.lines", 10**7, "less than or equal to 1000000"),
        ("search.calibration", ["mono:" + "e" * 10**6], ""),
        ("model.dtype", "q" * 10**6, ""),
    ],
)
def test_values_without_bounds_are_refused(key: str, value: object, words: str) -> None:
    refused_at = f"{key}[0]" if isinstance(value, list) else key
    with pytest.raises(SpecError) as caught:
        load_spec("quickstart", to_assignments({key: value}))
    line = str(caught.value)
    assert line.startswith(f"{refused_at}: ")
    assert words in line
    assert len(line) < 1500


def test_errors_are_short_and_printable(tmp_path: Path) -> None:
    error = UserError("key\x1b", "\x1b]0;title\x07" + "v" * 10**6, "first\nsecond \u202e" + "r" * 10**6)
    assert str(error).startswith("key\\x1b: \\x1b]0;title\\x07vvv")
    assert "first second \\u202errr" in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1500
    table = tmp_path / "corpus.tsv"
    table.write_text("en\t\x1b[31mfr\na\tb\n")
    with pytest.raises(CorpusError) as caught:
        open_corpus(str(table), ["it"])
    assert "en, \\x1b[31mfr" in str(caught.value)
