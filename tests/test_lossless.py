"""A tokenizer that loses characters is found: bits per byte would flatter it."""

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlprune.data.lossless import lost_characters, warn_of_lost_characters
from tests.tiny import sample, tokenizer

LANGUAGES = ("en", "fr", "hi", "ja", "ar", "th")


def without(folder: Path, pattern: str) -> PreTrainedTokenizerBase:
    """The test tokenizer, which drops what matches the pattern before it cuts a text into tokens."""
    tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    normalizer = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_lossless_tokenizer_is_not_reported(language: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_lost_characters(language, sample(*LANGUAGES).lines[language][:50], tokenizer())
    assert caplog.text == ""


def test_lost_characters_are_counted(tmp_path: Path) -> None:
    lossy = without(tmp_path, "[éè]")
    texts = ["Été, élève\u200b", "père  frère", "\ufb01n \u2026"]  # a zero-width space, a ligature, an ellipsis
    assert lost_characters(texts, lossy) == {"é": 2, "è": 3}
    assert lost_characters(texts, tokenizer()) == {}


def test_a_lossy_tokenizer_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, lossy = sample(*LANGUAGES), without(tmp_path, "[\u0900-\u097f]")
    with caplog.at_level(logging.WARNING):
        for language in LANGUAGES:
            warn_of_lost_characters(language, corpus.lines[language][:50], lossy)
    (record,) = caplog.records
    assert "of the characters of hi (" in record.getMessage()
    assert isinstance(record.args, tuple)
    assert float(str(record.args[0])) > 90
