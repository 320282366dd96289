"""Corpora: every file is read as it is, or is a CorpusError of one line."""

import json
import shutil
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlprune.data.code import open_code
from mlprune.data.corpora import open_corpus, split_held_out
from mlprune.data.questions import INFERENCE, SENTIMENT, open_questions
from mlprune.errors import UserError
from tests.fuzz.values import CASES, check_line, values

COLUMNS = ["en", "fr", "document", "translation", "premise", "hypothesis", "label", "review", "stars", "content"]
FILES = [b"", b"\n", b"\xff", b"en\tfr\n", b"\xef\xbb\xbfen\tfr\na\tb\n", b"[" * 5000]
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\t")
lines = st.lists(st.text(characters, max_size=12), max_size=30)
rows = st.lists(st.dictionaries(st.sampled_from(COLUMNS), values("a", "en"), max_size=4), max_size=12)


def check_corpus(where: str) -> None:
    try:
        corpus = open_corpus(where, ["en", "fr"])
        assert len({len(column) for column in (*corpus.lines.values(), corpus.documents)}) == 1
        assert all(text.strip() for column in corpus.lines.values() for text in column)
        halves = split_held_out(corpus, confirm=True)
        assert not set(halves.selection) & set(halves.confirmation)
    except UserError as error:
        check_line(error)


@CASES
@given(st.binary(max_size=200) | st.sampled_from(FILES), st.sampled_from(["x.tsv", "x.jsonl", "x.txt"]))
def test_bytes(content: bytes, name: str) -> None:
    Path(name).write_bytes(content)
    check_corpus(name)


@CASES
@given(lines, lines)
def test_folders_are_read_as_they_are(english: list[str], french: list[str]) -> None:
    folder = Path("corpus")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for code, column in (("en", english), ("fr", french)):
        (folder / f"{code}.txt").write_text("".join(f"{line}\n" for line in column), encoding="utf-8")
    check_corpus("corpus")
    if len(english) == len(french) > 0 and all(line.strip() for line in english + french):
        corpus = open_corpus("corpus", ["en", "fr"])
        expected = [line.removeprefix("\ufeff") if n == 0 else line for n, line in enumerate(english)]
        assert list(corpus.lines["en"]) == expected or not expected[0]


@CASES
@given(rows)
def test_rows(objects: list[dict[str, Any]]) -> None:
    folder = Path("rows")
    folder.mkdir(exist_ok=True)
    (folder / "en.jsonl").write_text("\n".join(map(json.dumps, objects)))
    check_corpus("rows/en.jsonl")
    for form in (INFERENCE, SENTIMENT):
        try:
            open_questions("rows", "en", form, 1, "evaluation.xnli")
        except UserError as error:
            check_line(error)
    try:
        open_code("rows/en.jsonl")
    except UserError as error:
        check_line(error)
