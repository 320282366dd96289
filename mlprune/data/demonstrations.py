"""Lines of a corpus set out as prompts: the demonstrations of Kim et al. (2024, arXiv 2409.16911).

    translation:en-fr    English: <line><eos>French: <line><eos>English: <next line><eos>...
    mono:fr              French: <line><eos>French: <next line><eos>...
    code                 a file of program code from its beginning

How a line is set out, `{language}: {text}` above, and what follows it, are the user's to change.

Departures from the paper's code, whose two kinds see different sentences (one shuffles, the other does not,
skips a line a prompt and runs past the end): here the lines of a prompt depend on the corpus, the number of
shots and the seed, not on the kind, so that kinds are compared on the same sentences.
"""

import random
from collections.abc import Sequence

from mlprune.data.code import CodeFiles
from mlprune.data.corpora import Corpus, calibration_lines
from mlprune.errors import CorpusError
from mlprune.spec.languages import language_name
from mlprune.spec.variants import Demonstration


def prompt(
    corpus: Corpus, demonstration: Demonstration, lines: Sequence[int], template: str, separator: str
) -> str:
    """One prompt of the lines numbered `lines` (from 0), each in every language of the demonstration.

    Raises CorpusError when the corpus was opened without one of the languages.
    """
    return "".join(
        template.format(language=language_name(language), text=corpus.column(language, "calibration")[line])
        + separator
        for line in lines
        for language in demonstration.languages
    )


def sample_lines(corpus: Corpus, samples: int, shots: int, seed: int) -> list[tuple[int, ...]]:
    """The lines (from 0) of each prompt: `samples` disjoint runs of `shots`, in the seed's order.

    Raises CorpusError when the corpus has too few lines for calibration.
    """
    order = calibration_lines(corpus, seed)
    enough = len(order) // shots
    if samples > enough:
        remedy = f"{corpus.name!r} has {len(order)} lines for calibration, enough for {enough} samples"
        raise CorpusError("calibration.samples", samples, f"{remedy} of {shots} shots; ask for no more")
    return [order[start : start + shots] for start in range(0, samples * shots, shots)]


def sample_files(code: CodeFiles, samples: int, seed: int) -> list[tuple[str, str]]:
    """`samples` files of code, each its path and text, in the seed's order.

    Raises CorpusError when there are too few.
    """
    if samples > len(code.files):
        remedy = f"the code {code.name!r} has {len(code.files)} files that are not blank; ask for no more"
        raise CorpusError("calibration.samples", samples, remedy)
    order = list(code.files)
    random.Random(seed).shuffle(order)
    return order[:samples]
