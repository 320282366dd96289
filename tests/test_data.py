"""Corpora: the same text from every form, and one-line errors for malformed ones."""

import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlprune.data.corpora import open_corpus
from mlprune.errors import CorpusError
from tests.tiny import DOCUMENTS, ENGLISH, FRENCH, SAMPLE, hand_made

# What a corpus is


def write_folder(folder: Path) -> str:
    folder.mkdir()
    (folder / "en.txt").write_bytes("\r\n".join(ENGLISH).encode() + b"\r\n")
    (folder / "fr.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(FRENCH).encode())
    (folder / "DOCUMENT_IDS.tsv").write_text("\n".join(DOCUMENTS) + "\n")
    (folder / "README.txt").write_text("Not a language.\n")
    return str(folder)


def write_tsv(folder: Path) -> str:
    rows = [("document", "en", "fr"), *zip(DOCUMENTS, ENGLISH, FRENCH, strict=True)]
    path = folder.with_suffix(".tsv")
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def write_jsonl(folder: Path) -> str:
    rows = zip(DOCUMENTS, ENGLISH, FRENCH, strict=True)
    path = folder.with_suffix(".jsonl")
    text = (json.dumps({"document": d, "fr": f, "en": e}, ensure_ascii=False) for d, e, f in rows)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


def write_dataset(folder: Path) -> str:
    import datasets

    columns = {"en": ENGLISH, "fr": FRENCH, "document": DOCUMENTS}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return str(folder)


def write_translations(folder: Path) -> str:
    import datasets

    pairs = [{"en": e, "fr": f} for e, f in zip(ENGLISH, FRENCH, strict=True)]
    datasets.Dataset.from_dict({"translation": pairs, "document": DOCUMENTS}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("write", [write_folder, write_tsv, write_jsonl, write_dataset, write_translations])
def test_every_form_gives_the_same_corpus_verbatim(write: Callable[[Path], str], tmp_path: Path) -> None:
    where = write(tmp_path / "corpus")
    corpus = open_corpus(where, ["fr", "en", "fr"])
    assert corpus.name == where
    assert {code: list(lines) for code, lines in corpus.lines.items()} == {"fr": FRENCH, "en": ENGLISH}
    assert corpus.documents == tuple(DOCUMENTS)
    assert len(corpus) == 4
    with pytest.raises(CorpusError, match=r"has no hi; it has (en, fr|fr, en):"):
        open_corpus(where, ["en", "hi"])


def test_only_the_requested_languages_are_read(tmp_path: Path) -> None:
    where = write_folder(tmp_path / "corpus")
    (tmp_path / "corpus" / "de.txt").write_bytes(b"\xff one line, and that not UTF-8")
    assert set(open_corpus(where, ["fr"]).lines) == {"fr"}
    with pytest.raises(CorpusError, match=r"de\.txt is not UTF-8 at byte 0"):
        open_corpus(where, ["fr", "de"])


def test_the_sample_has_fourteen_aligned_languages_with_documents() -> None:
    codes = sorted(path.stem for path in SAMPLE.glob("*.txt"))
    corpus = open_corpus("sample", codes)
    assert codes == ["ar", "de", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "th", "tr", "vi", "zh"]
    assert {len(lines) for lines in corpus.lines.values()} == {1200}
    assert corpus.documents[0] == "bbc.381790"
    assert not any("\r" in line or "\n" in line for lines in corpus.lines.values() for line in lines)


def test_a_hub_id_is_taken_apart_and_its_columns_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        assert not streaming, "all lines are wanted"
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"en": ENGLISH, "fr": FRENCH})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for where in ("org/name", "org/name:en-fr", "name@test[:50%]", "org/name:en-fr@test"):
        assert list(open_corpus(where, ["fr"]).lines["fr"]) == FRENCH
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "en-fr", "train"),
        ("name", None, "test[:50%]"),
        ("org/name", "en-fr", "test"),
    ]


def test_a_dataset_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CorpusError) as caught:
        open_corpus("org/name:x", ["fr"])
    assert str(caught.value).startswith("calibration.corpus: 'org/name:x': cannot be loaded as a Hugging Face")
    assert "(no network at all); check its name, config and split, or give a folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_datasets_is_imported_only_for_a_dataset() -> None:
    code = "import sys; from mlprune.data.corpora import open_corpus as o; o('sample', ['fr'])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'datasets' not in sys.modules"], check=True)


def test_a_column_that_was_not_opened_names_key_and_languages() -> None:
    with pytest.raises(CorpusError) as caught:
        hand_made().column("hi", "search.calibration")
    assert str(caught.value) == "search.calibration: 'hi': not in the corpus 'hand'; it has en, fr"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


BROKEN = {
    "short/fr.txt": ("a\nb\n", "en has 3 lines and fr has 2"),
    "blank/fr.txt": ("a\n \u2028\nc\n", "line 2 of fr is empty; remove the line from every language"),
    "last/fr.txt": ("a\nb\n\n", "line 3 of fr is empty; remove"),
    "none/fr.txt": ("", "fr.txt is empty"),
    "ids/DOCUMENT_IDS.tsv": ("a\nb\n", "en has 3 lines and document has 2"),
    "ragged.tsv": ("en\tfr\na\tb\nc\n", "row 2 below the header has 1 columns; the header has 2"),
    "twice.tsv": ("en\ten\tfr\na\tb\tc\n", "names a column twice"),
    "header.tsv": ("en\tfr\n", "has no lines"),
    "cut.jsonl": ('{"en": "a", "fr": "b"}\n{"en": "a", \n', "line 2 is not JSON"),
    "list.jsonl": ('["a", "b"]\n', "line 1 is not an object; write"),
    "gap.jsonl": ('{"en": "a", "fr": "b"}\n{"en": "a"}\n', "line 2 of fr is empty"),
    "number.jsonl": ('{"en": "a", "fr": 3}\n', "line 1 of fr is int, not text"),
    "half.jsonl": ('{"en": "a", "fr": "\\ud83d"}\n', "line 1 of fr has half a character"),
    "corpus.csv": ("en,fr\n", "not a corpus; give a folder"),
}


@pytest.mark.parametrize(("name", "text", "remedy"), [(name, *rest) for name, rest in BROKEN.items()])
def test_a_broken_corpus_is_a_one_line_error(name: str, text: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.parent != tmp_path:
        for code in ("en", "fr"):
            (path.parent / f"{code}.txt").write_text("a\nb\nc\n")
    path.write_text(text)
    where = str(path if path.parent == tmp_path else path.parent)
    with pytest.raises(CorpusError) as caught:
        open_corpus(where, ["en", "fr"], key="evaluation.corpus")
    assert str(caught.value).startswith(f"evaluation.corpus: {where!r}: ")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["/no/such", "./corpus", "../corpus", "corpus.tsv", "org/corpus.jsonl"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(where: str) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        open_corpus(where, ["en"])


def test_a_saved_dataset_of_several_splits_names_the_folder_to_give(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_dict({"en": ENGLISH})
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path))
    with pytest.raises(CorpusError, match=f"give the folder of one, as {tmp_path / 'train'}"):
        open_corpus(str(tmp_path), ["en"])
    assert list(open_corpus(str(tmp_path / "train"), ["en"]).lines["en"]) == ENGLISH


def test_retries_of_the_hub_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    retries = logging.getLogger("huggingface_hub.utils._http")

    def load_dataset(*_: object, **__: object) -> Any:
        retries.warning("Retrying in 8s")
        raise ConnectionError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with caplog.at_level(logging.INFO, "mlprune"), pytest.raises(CorpusError, match="unreachable"):
        open_corpus("some/corpus", ["en"])
    assert [record.getMessage() for record in caplog.records] == ["opening the Hugging Face dataset some/corpus"]
    retries.warning("afterwards")
    assert "afterwards" in caplog.text
