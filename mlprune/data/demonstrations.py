"""Demonstrations: lines of a corpus, or files of code, formatted as calibration prompts. No tokens here.

The kinds are those of Kim et al. (2024, arXiv 2409.16911):

    translation:en-fr    English: <line><eos>French: <line><eos>English: <next line><eos>...
    mono:fr              French: <line><eos>French: <next line><eos>...
    code                 a file of program code from its beginning

The user may change the format of a line, `{language}: {text}` above, and the separator that follows it.

Departure from the paper's code, whose two kinds see different sentences (one shuffles; the other does not, skips
one line per prompt and runs past the end): here the lines of a prompt depend on the corpus, the number of shots
and the seed, not on the kind, so that kinds are compared on the same sentences.
"""

import random
from collections.abc import Sequence

from mlprune.data.code import CodeFiles
from mlprune.data.corpora import Corpus, calibration_lines
from mlprune.errors import CorpusError
from mlprune.spec.calibrations import Demonstration
from mlprune.spec.languages import language_name


def build_prompt(
    corpus: Corpus, demonstration: Demonstration, lines: Sequence[int], template: str, separator: str
) -> str:
    """Return one prompt: the lines numbered `lines` (from 0), each in every language of the demonstration.

    Raises CorpusError when the corpus was opened without one of the languages.
    """
    return "".join(
        template.format(language=language_name(language), text=corpus.column(language, "calibration")[line])
        + separator
        for line in lines
        for language in demonstration.languages
    )


def sample_lines(corpus: Corpus, samples: int, shots: int, seed: int) -> list[tuple[int, ...]]:
    """Return each prompt's line numbers (from 0): `samples` disjoint runs of `shots` lines, ordered by the seed.

    Raises CorpusError when the corpus has too few lines for calibration.
    """
    order = calibration_lines(corpus, seed)
    enough = len(order) // shots
    if samples > enough:
        remedy = f"{corpus.name!r} has {len(order)} lines for calibration, enough for {enough} samples"
        raise CorpusError("calibration.samples", samples, f"{remedy} of {shots} shots; use a smaller number")
    return [order[start : start + shots] for start in range(0, samples * shots, shots)]


def sample_files(code: CodeFiles, samples: int, seed: int) -> list[tuple[str, str]]:
    """Return path and text of `samples` files of code, ordered by the seed.

    Raises CorpusError when there are too few files.
    """
    if samples > len(code.files):
        remedy = f"the code {code.name!r} has {len(code.files)} files that are not blank; use a smaller number"
        raise CorpusError("calibration.samples", samples, remedy)
    order = list(code.files)
    random.Random(seed).shuffle(order)
    return order[:samples]
