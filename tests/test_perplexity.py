"""Perplexity items: the documents of held-out lines, where the corpus names them."""

from dataclasses import replace
from pathlib import Path

from mlprune.data.corpora import BLOCK_LINES, Corpus, open_corpus, split_held_out
from mlprune.evaluation.items import Items
from mlprune.evaluation.perplexity import Perplexity, build_perplexity
from mlprune.spec.evaluation import PerplexitySpec
from tests.tiny import sample, tokenizer


def built(corpus: Corpus) -> Perplexity:
    lines = split_held_out(corpus, confirm=True).selection[:40]
    spec = PerplexitySpec(languages=("en", "fr"))
    return build_perplexity(spec, corpus, lines, tokenizer(), None, pad_free=False)


def items(corpus: Corpus) -> list[Items]:
    task = built(corpus)
    return task.items([1.0] * task.rows.count)


def test_lines_have_the_documents_that_the_corpus_names() -> None:
    corpus = sample()
    documents = tuple(corpus.documents[line] for line in split_held_out(corpus, confirm=True).selection[:40])
    assert 2 < len(set(documents)) < 20
    assert [part.documents for part in items(corpus)] == [documents, documents]


def test_blocks_of_lines_are_no_documents() -> None:
    corpus = sample()
    blocks = tuple(str(line // BLOCK_LINES) for line in range(len(corpus)))
    unnamed = replace(corpus, documents=blocks, documents_named=False)
    assert [part.documents for part in items(unnamed)] == [(), ()]
    assert [len(set(part.units)) for part in items(unnamed)] == [40, 40]


def test_a_corpus_says_whether_it_names_documents(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One\nTwo\n")
    assert not open_corpus(str(tmp_path), ["en"]).documents_named
    (tmp_path / "DOCUMENT_IDS.tsv").write_text("a\nb\n")
    assert open_corpus(str(tmp_path), ["en"]).documents_named


def test_the_key_of_rows_does_not_depend_on_documents() -> None:
    """Results that earlier versions stored without documents are found under the same key."""
    corpus = sample()
    unnamed = replace(corpus, documents_named=False)
    assert built(corpus).rows.key == built(unnamed).rows.key
