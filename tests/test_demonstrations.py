"""Which lines are used for what, and how they are set out as prompts."""

from itertools import groupby
from pathlib import Path
from random import Random

import pytest

from mlprune.data.corpora import Corpus, calibration_lines, held_out, measuring_lines, open_corpus
from mlprune.data.demonstrations import build_prompt, sample_lines
from mlprune.errors import CorpusError, SpecError
from mlprune.spec.calibrations import Demonstration
from mlprune.spec.templates import check_template
from tests.tiny import hand_made, sample

TRANSLATION = Demonstration.parse("translation:en-fr")
FRENCH_ONLY = Demonstration.parse("mono:fr")
PLAIN = "{language}: {text}"

# Which lines are used for what


def test_calibration_and_evaluation_share_no_document_and_leave_no_line_out() -> None:
    corpus = sample()
    kept = held_out(corpus)
    for seed in range(3):
        used = calibration_lines(corpus, seed)
        assert sorted(kept + used) == list(range(1200))
        assert not {corpus.documents[line] for line in kept} & {corpus.documents[line] for line in used}
    assert 300 <= len(kept) < 300 + 35  # a quarter, and less than one document (35 lines at most) above it


def test_the_seed_moves_documents_not_lines_in_them_and_not_the_split() -> None:
    corpus = sample()
    first, second = calibration_lines(corpus, 0), calibration_lines(corpus, 1)
    assert first == calibration_lines(corpus, 0) != second
    assert set(first) == set(second)
    documents = [(name, list(lines)) for name, lines in groupby(first, lambda line: corpus.documents[line])]
    assert len(documents) == len(dict(documents))  # none in two pieces
    assert all(lines == sorted(lines) for _, lines in documents)


def test_held_out_documents_go_by_the_hash_of_their_id_wherever_their_lines_are() -> None:
    # sha256 begins: b 3e23..., a ca97..., c 2e7d...: so c, then b, then a
    corpus = Corpus("hand", {"en": tuple("stuvwxyz")}, tuple("abacaaba"))
    assert held_out(corpus) == (3, 1, 6)  # c has one line of eight, too few for a quarter; b's two are apart
    assert calibration_lines(corpus, 0) == (0, 2, 4, 5, 7)
    assert held_out(Corpus("two", {"en": ("x", "y")}, ("a", "b"))) == (1,)
    most_in_last = Corpus("most", {"en": tuple("stuvwxyz")}, tuple("caaaaaaa"))
    assert held_out(most_in_last) == (0,)  # never every document, though this is under a quarter


def test_without_ids_ten_neighbouring_lines_are_a_document(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text("en\n" + "line\n" * 25)
    corpus = open_corpus(str(path), ["en"])
    assert corpus.documents == ("0",) * 10 + ("1",) * 10 + ("2",) * 5
    path.write_text("en\n" + "line\n" * 10)
    with pytest.raises(CorpusError, match="is one document; give it document ids, or more than 10 lines"):
        held_out(open_corpus(str(path), ["en"]))


def test_samples_are_disjoint_runs_in_calibration_order() -> None:
    corpus = sample()
    order = calibration_lines(corpus, 5)
    runs = sample_lines(corpus, 7, 4, 5)
    assert [len(run) for run in runs] == [4] * 7
    assert tuple(line for run in runs for line in run) == order[:28]


def test_too_many_samples_say_how_many_there_are() -> None:
    corpus = sample()
    lines = len(calibration_lines(corpus, 0))
    assert len(sample_lines(corpus, lines // 4, 4, 0)) == lines // 4
    with pytest.raises(CorpusError) as caught:
        sample_lines(corpus, lines // 4 + 1, 4, 0)
    remedy = f"'sample' has {lines} lines for calibration, enough for {lines // 4} samples of 4 shots"
    assert str(caught.value) == f"calibration.samples: {lines // 4 + 1}: {remedy}; use a smaller number"


def test_no_line_is_skipped_none_used_twice_and_none_made_up() -> None:
    """The paper's code leaves out a line a prompt for one of its kinds, and runs past the end."""
    corpus = sample()
    order = calibration_lines(corpus, 0)
    runs = sample_lines(corpus, len(order) // 4, 4, 0)
    assert len(order) - 4 < len({line for run in runs for line in run}) == 4 * len(runs) <= len(order)
    texts = [build_prompt(corpus, FRENCH_ONLY, run, "{text}", "\n") for run in runs]
    assert "".join(texts) == "".join(f"{corpus.lines['fr'][line]}\n" for line in order[: 4 * len(runs)])


def test_lines_for_measuring_are_spaced_over_the_text_that_is_not_held_out() -> None:
    corpus = sample()
    order = sorted(calibration_lines(corpus, 0))
    assert measuring_lines(corpus, 4) == tuple(order[n * len(order) // 4] for n in range(4))
    assert measuring_lines(corpus, 10**6) == tuple(order)
    assert len({corpus.documents[line] for line in measuring_lines(corpus, 8)}) == 8


# How they are set out


def test_a_prompt_is_exactly_its_lines_under_their_languages_names() -> None:
    corpus = hand_made()
    assert build_prompt(corpus, TRANSLATION, [3, 1], PLAIN, "</s>") == (
        "English: Four</s>French: Quatre</s>English: Two</s>French: Deux</s>"
    )
    assert build_prompt(corpus, FRENCH_ONLY, [2], PLAIN, "<eos>") == "French:  Trois <eos>"
    with pytest.raises(CorpusError, match="'hi': not in the corpus 'hand'; it has en, fr"):
        build_prompt(corpus, Demonstration.parse("mono:hi"), [0], PLAIN, "</s>")


def test_a_line_is_set_out_by_the_template_and_followed_by_the_separator() -> None:
    corpus = hand_made()
    assert build_prompt(corpus, TRANSLATION, [3, 1], "{text} ({language})", "\n") == (
        "Four (English)\nQuatre (French)\nTwo (English)\nDeux (French)\n"
    )
    assert build_prompt(corpus, FRENCH_ONLY, [1, 0], "{text}", "") == "DeuxUne ligne"
    assert build_prompt(corpus, FRENCH_ONLY, [1], "{{{language}}} {text}{text}", " | ") == "{French} DeuxDeux | "


def test_braces_of_the_text_and_the_separator_are_text() -> None:
    odd = ("{language} {0} {", "}} {text} {{x!r:>9}}")
    corpus = Corpus("odd", {"en": odd}, ("a", "b"))
    made = build_prompt(corpus, Demonstration.parse("mono:en"), [0, 1], PLAIN, "{text}\n")
    assert made == f"English: {odd[0]}{{text}}\nEnglish: {odd[1]}{{text}}\n"


BAD_TEMPLATES = {
    "{language}: ": "needs {text} once; its slots are {language}, {text}",
    "{{text}}": "needs {text} once",
    "": "needs {text} once",
    "{text} {line}": "has a slot that is none of {language}, {text}; remove it",
    "{text} {}": "has a slot",
    "{text} {0}": "has a slot",
    "{text.__class__}": "has a slot",
    "{text[0]}": "has a slot",
    "{text!r}": "has a slot",
    "{text:>20}": "has a slot",
    "{text:{language}}": "has a slot",
    "{text": "expected '}' before end of string; write a brace that is not a slot twice, {{ or }}",
    "{text} }": "Single '}' encountered in format string; write a brace",
    "{text} {": "Single '{' encountered in format string; write a brace",
    "{text!}\n": "write a brace",
}


@pytest.mark.parametrize(("template", "remedy"), BAD_TEMPLATES.items())
def test_a_template_that_cannot_be_filled_is_answered_in_one_line(template: str, remedy: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_template(template, "calibration.template", ["text"], ["language"])
    assert str(caught.value).startswith(f"calibration.template: {template!r}: ")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_template_that_passes_can_be_filled() -> None:
    """Random strings of what templates are made of: those that pass give the text, verbatim and whole."""
    random, pieces = Random(0), ["{", "}", "{{", "}}", "{text}", "{language}", "!", ":", "[", ".", "x", "text"]
    passed = 0
    for _ in range(20_000):
        template = "".join(random.choices(pieces, k=random.randint(1, 5)))
        try:
            check_template(template, "key", ["text"], ["language"])
        except SpecError:
            continue
        passed += 1
        assert "Deux" in build_prompt(hand_made(), FRENCH_ONLY, [1], template, "")
    assert passed > 1000
