"""`mlprune calibration`: the calibration text of a variant as a file, for other tools that calibrate.

Beside it a card says where the text comes from. No weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlprune import __version__
from mlprune.data.calibration import CalibrationSet, Prompt
from mlprune.errors import SpecError, StorageError
from mlprune.spec.calibrations import MIX
from mlprune.spec.schema import SweepSpec
from mlprune.spec.variants import Variant
from mlprune.storage.files import check_folder, storage_errors, write_whole
from mlprune.sweep.prepare import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["text", "messages", "tokens", "plain"]
SAMPLE_LICENCE = "CC BY-SA 4.0 (NTREX-128)"


@dataclass(frozen=True)
class CalibrationFile:
    """A written file of prompts, and its card."""

    file: Path
    card: Path
    prompts: int
    tokens: int


def write_calibration(spec: SweepSpec, variant: Variant, output: Path, form: Form) -> CalibrationFile:
    """Write the prompts that `variant` is calibrated on to the new file `output`, and a card beside it.

    Every text of a mixture has the same number of prompts: a file has no weights. The prompts of several texts
    take turns, so that a tool that reads only the first ones reads of each. Raises UserError if the file exists,
    or the variant reads no text.
    """
    card = output.with_name(f"{output.name}.card.md")
    for path in (output, card):
        if path.exists():
            raise StorageError("--output", repr(str(path)), "exists already; name a new file")
    check_folder(output.parent, "--output", output)
    if not variant.sides:
        raise SpecError("--calibration", variant.label, "reads no calibration text")
    prepared = prepare(spec, [variant], evaluate=False)
    prompts = _in_turns(prepared.sets_of(variant))
    content = _FORMS[form](prompts, prepared.source.tokenizer())
    with storage_errors("--output", str(output)):
        write_whole(output, content.encode())
        write_whole(card, _card(spec, variant, prompts, form).encode())
    return CalibrationFile(output, card, len(prompts), sum(len(prompt.ids) for prompt in prompts))


def _in_turns(sets: Sequence[CalibrationSet]) -> list[Prompt]:
    """Return all prompts: the first of each set, then the second of each, and so on."""
    longest = max(len(one.prompts) for one in sets)
    return [one.prompts[n] for n in range(longest) for one in sets if n < len(one.prompts)]


def _texts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return each prompt's text, as far as its tokens go."""
    return [tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False) for prompt in prompts]


def _lines(values: Sequence[object]) -> str:
    return "".join(f"{json.dumps(value, ensure_ascii=False)}\n" for value in values)


_FORMS: Mapping[Form, Callable[[Sequence[Prompt], PreTrainedTokenizerBase], str]] = {
    "text": lambda prompts, tokenizer: _lines([{"text": text} for text in _texts(prompts, tokenizer)]),
    "messages": lambda prompts, tokenizer: _lines(
        [{"messages": [{"role": "user", "content": text}]} for text in _texts(prompts, tokenizer)]
    ),
    "tokens": lambda prompts, tokenizer: _lines([{"input_ids": list(prompt.ids)} for prompt in prompts]),
    "plain": lambda prompts, tokenizer: "\n\n".join(_texts(prompts, tokenizer)) + "\n",
}


def _card(spec: SweepSpec, variant: Variant, prompts: Sequence[Prompt], form: Form) -> str:
    options = spec.calibration
    licence = SAMPLE_LICENCE if options.corpus == "sample" else "that of the corpus"
    plain = all(side.combination == MIX and len({share for _, share in side.parts}) == 1 for side in variant.sides)
    note = (
        "\nThe variant weighs or combines its texts in a way that a file cannot express: here each text has the "
        "same number of prompts.\n"
    )
    rows = [
        f"| {number} | {prompt.kind} | {', '.join(map(str, prompt.lines)) or prompt.source} | {len(prompt.ids)} |"
        for number, prompt in enumerate(prompts, start=1)
    ]
    return "\n".join(
        [
            f"# Calibration text: {', '.join(str(side) for side in variant.sides)}",
            "",
            f"{len(prompts)} prompts for {spec.model.path}, written by mlprune {__version__} (format: {form}).",
            "" if plain else note,
            "| | |",
            "| --- | --- |",
            f"| corpus | {options.corpus} |",
            f"| licence | {licence} |",
            f"| lines per prompt | {options.shots} |",
            f"| longest prompt | {options.max_tokens} tokens |",
            f"| seed | {variant.seed} |",
            "",
            "| prompt | text | lines of the corpus, or file | tokens |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
