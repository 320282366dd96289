"""Few-shot translation: prompts by hand, where an answer ends, and what the whole model writes."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from mlprune.data.corpora import Corpus, held_out
from mlprune.data.demonstrations import sample_lines
from mlprune.errors import CorpusError, ModelError, UserError
from mlprune.evaluation.items import metrics_of
from mlprune.evaluation.translation import Translation, build_translation
from mlprune.models.quiet import quiet_transformers
from mlprune.spec.evaluation import TranslationSpec
from tests.tiny import sample, tokenizer
from tests.tiny_models import source
from tests.work import opened, ready

COUNT = 24
NUMBERS = {
    "en": [f"Here is {n}" + "!" * (n % 3) for n in range(COUNT)],
    "fr": [f"Voici {n}" + "." * (n % 4) for n in range(COUNT)],
    "sw": [f"Hii ni {n}" for n in range(COUNT)],
}
CORPUS = Corpus(
    "numbers", {code: tuple(lines) for code, lines in NUMBERS.items()}, tuple(str(n // 3) for n in range(COUNT))
)


def translation_spec(*pairs: str, **changes: Any) -> TranslationSpec:
    values = {"pairs": pairs or ("fr-en",), "shots": 2, "lines": 3, "max_new_tokens": 9, **changes}
    return TranslationSpec(**values)


def made(
    spec: TranslationSpec | None = None,
    corpus: Corpus = CORPUS,
    by: Any = None,
    positions: int | None = None,
    **changes: Any,
) -> Translation:
    layout = {
        "seed": 3,
        "template": "{language}: {text}",
        "separator": None,
        "selection": held_out(corpus),
        **changes,
    }
    return build_translation(spec or translation_spec(), corpus, by or tokenizer(), positions, **layout)


def texts(task: Translation) -> list[str]:
    return [tokenizer().decode(request.prompt) for request in task.requests]


def test_a_prompt_is_shots_the_line_and_the_name_of_the_target() -> None:
    (a, b), *_ = sample_lines(CORPUS, 1, 2, seed=3)
    lines = held_out(CORPUS)[:3]
    en, fr, sw = NUMBERS["en"], NUMBERS["fr"], NUMBERS["sw"]
    french = f"French: {fr[a]}</s>English: {en[a]}</s>French: {fr[b]}</s>English: {en[b]}</s>French: "
    english = f"English: {en[a]}</s>Swahili: {sw[a]}</s>English: {en[b]}</s>Swahili: {sw[b]}</s>English: "
    task = made(translation_spec("fr-en", "en-sw"))
    assert texts(task) == [
        *(f"{french}{fr[n]}</s>English:" for n in lines),
        *(f"{english}{en[n]}</s>Swahili:" for n in lines),
    ]
    about = [(one.pair, one.line, one.reference) for one in task.requests]
    assert about == [*(("fr-en", n + 1, en[n]) for n in lines), *(("en-sw", n + 1, sw[n]) for n in lines)]
    eos = tokenizer().eos_token_id
    assert [one.prompt.count(eos) for one in task.requests] == [5] * 6, "one token each, as in calibration"


def test_template_and_separator_are_calibrations() -> None:
    ((a,), *_), x = sample_lines(CORPUS, 1, 1, seed=3), held_out(CORPUS)[0]
    en, fr = NUMBERS["en"], NUMBERS["fr"]
    spec = translation_spec(shots=1, lines=1)
    task = made(spec, template="In {language} «{text}»", separator=" ## ")
    assert texts(task) == [f"In French «{fr[a]}» ## In English «{en[a]}» ## In French «{fr[x]}» ## In English «"]
    task = made(spec, template="{language}:\n{text}", separator="\n\n")
    lines = f"French:\n{fr[a]}\n\nEnglish:\n{en[a]}\n\nFrench:\n{fr[x]}\n\nEnglish:\n"
    assert texts(task) == [lines], "a line end stays: it would end an answer that began with it"
    task = made(spec, template="{text} ({language})", separator="\n")
    assert texts(task) == [f"{fr[a]} (French)\n{en[a]} (English)\n{fr[x]} (French)\n"]


@pytest.mark.parametrize("seed", range(5))
def test_no_shot_is_a_held_out_line_and_all_pairs_have_the_same(seed: int) -> None:
    corpus = sample("en", "fr", "sw")
    task = made(translation_spec("fr-en", "sw-en", shots=3, lines=2), corpus, seed=seed)
    kept = {corpus.lines["en"][line] for line in held_out(corpus)}
    shots = [text.split("English: ")[1:] for text in texts(task)]
    english = [[shot.partition("</s>")[0] for shot in of_prompt] for of_prompt in shots]
    assert [len(of_prompt) for of_prompt in english] == [3] * 4
    assert not kept & {shot for of_prompt in english for shot in of_prompt}
    assert all(of_prompt == english[0] for of_prompt in english)
    assert english[0] == [corpus.lines["en"][line] for line in sample_lines(corpus, 1, 3, seed)[0]]


# Where an answer ends


class Writer:
    """In place of a pipeline: writes the given texts, and keeps what was requested."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.request: dict[str, Any] = {}
        self.written: list[str] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        ended: Callable[[int, Sequence[int]], bool],
        variant: str | None = None,
        progress: Any = None,
    ) -> list[list[int]]:
        self.request = {"prompts": prompts, "variant": variant, "progress": progress}
        told = []
        for row, text in enumerate(self.texts):
            new: list[int] = []
            for token in tokenizer()(text).input_ids[:max_new]:
                new.append(token)
                if ended(row, new):
                    break
            told.append(new)
        self.written = [tokenizer().decode(tokens) for tokens in told]
        return told


QUOTED = {"template": 'In {language} "{text}"', "separator": "##\n"}
ENDS: list[tuple[dict[str, Any], str, str, str]] = [  # layout, text, what is written of it, answer
    ({}, " Here it is</s>French: x", " Here it is</s>", "Here it is"),
    ({}, " Here it is\nor not</s>", " Here it is\n", "Here it is"),
    ({}, " Here it is", " Here it is", "Here it is"),
    ({}, "</s>", "</s>", ""),
    ({}, "\n Here", "\n", ""),
    ({"separator": " ##"}, " Here # it ##is", " Here # it ##", "Here # it"),
    ({"separator": " ##"}, " Here</s> it ##", " Here</s>", "Here"),
    ({"separator": "<pad>"}, " Here it<pad> is", " Here it<pad>", "Here it"),
    ({"separator": " "}, " Here it is\n", " Here it is\n", "Here it is"),
    ({"separator": ""}, " Here it is\n", " Here it is\n", "Here it is"),
    ({"separator": "\n\n"}, " Here it is\n\n", " Here it is\n", "Here it is"),
    (QUOTED, 'He "is" "##\nIn', 'He "is" "##\n', 'He "is"'),
    (QUOTED, 'He "is\nIn', 'He "is\n', 'He "is'),
    (QUOTED, 'He ## is"</s>', 'He ## is"</s>', "He ## is"),
]


@pytest.mark.parametrize(("layout", "text", "written", "answer"), ENDS)
def test_an_answer_ends_at_the_first_of_separator_end_of_sequence_and_line_end(
    layout: dict[str, Any], text: str, written: str, answer: str
) -> None:
    task = made(translation_spec(lines=1, max_new_tokens=90), **layout)
    writer: Any = Writer(text)
    (items,) = task.run(writer, None)
    assert items.columns["output"] == (answer,)
    assert writer.written == [written], "it ends with the token that ends it"


def test_every_pair_gets_the_answers_to_its_lines_in_one_call() -> None:
    task = made(translation_spec("fr-en", "en-fr", lines=2))
    writer: Any = Writer(" one</s>", " two</s>", " un</s>", " deux</s>")
    english, french = task.run(writer, "a variant", print)
    assert writer.request == {
        "prompts": [one.prompt for one in task.requests],
        "variant": "a variant",
        "progress": print,
    }
    lines = held_out(CORPUS)[:2]
    for items, pair, output in ((english, "fr-en", ("one", "two")), (french, "en-fr", ("un", "deux"))):
        assert (items.task, items.language, items.kind) == ("translation", pair, "translation")
        assert items.ids == tuple(str(line + 1) for line in lines)
        assert items.documents == tuple(CORPUS.documents[line] for line in lines)
        reference = tuple(CORPUS.lines[pair[3:]][line] for line in lines)
        assert items.columns == {"output": output, "reference": reference}
    assert {"bleu.fr-en", "chrf.en-fr", "bleu.mean"} <= set(metrics_of([english, french]))
    writer = Writer(" a</s>")
    unnamed = made(translation_spec(lines=1), replace(CORPUS, documents_named=False)).run(writer, "a variant")
    assert unnamed[0].documents == ()


@torch.inference_mode()
def test_answers_are_what_the_whole_model_writes(tmp_path: Path) -> None:
    with quiet_transformers():
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(source("gpt2").folder).eval()
    model.generation_config.eos_token_id = None
    task = made(translation_spec("fr-en", "en-sw", lines=6, shots=1, max_new_tokens=24), positions=512)

    def plain(prompt: Sequence[int]) -> str:
        ids = torch.tensor([prompt])
        with quiet_transformers():
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
        return str(tokenizer().decode(out[0, len(prompt) :]))

    whole = [plain(request.prompt) for request in task.requests]
    # these weights write no sentences: the end is the letter before which most different answers stand
    letters = sorted(set("".join(whole)) - {"\ufffd"})
    end = max(letters, key=lambda one: len({t.partition(one)[0] for t in whole if one in t}))
    assert len({text.partition(end)[0] for text in whole if end in text}) > 3
    for shards in (1, 2):
        with opened(ready(tmp_path / str(shards), source("gpt2"), shards)) as pipeline:
            items = replace(task, ends=(end,)).run(pipeline, None)
        outputs = [output for of_pair in items for output in of_pair.columns["output"]]
        assert outputs == [text.partition(end)[0].strip() for text in whole]


# What the planner and the store are told


def test_the_plan_counts_padded_prompts_and_room_for_the_answer() -> None:
    spec = translation_spec("fr-en", "en-sw", lines=5)
    lengths = [len(request.prompt) for request in made(spec).requests]
    assert len(set(lengths)) > 1
    assert made(spec).tokens == 10 * max(lengths), "all are one group"
    assert made(spec).longest_row == max(lengths) + 9
    assert made(spec).cached_tokens == 10 * made(spec).longest_row


def test_the_key_is_of_all_that_the_answers_depend_on() -> None:
    english = CORPUS.lines["en"]
    last = held_out(CORPUS)[2]
    corrected = tuple(text + "?" * (line == last) for line, text in enumerate(english))
    tasks = [
        made(),
        made(seed=4),
        made(template="{language}: {text}."),
        made(separator="\n"),
        made(translation_spec(shots=1)),
        made(translation_spec(lines=2)),
        made(translation_spec(max_new_tokens=8)),
        made(translation_spec("en-fr")),
        made(corpus=replace(CORPUS, lines={**CORPUS.lines, "en": corrected})),
    ]
    assert len({task.key for task in tasks}) == len(tasks)
    assert made().key == made().key


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    ending = deepcopy(tokenizer())
    eos = ("</s>", ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[eos])
    assert ending("a").input_ids[-1] == ending.eos_token_id
    assert [one.prompt for one in made(by=ending).requests] == [one.prompt for one in made().requests]
    last = made(translation_spec(lines=1), template="{text}").requests[0]
    assert last.prompt[-1] == tokenizer().eos_token_id, "the separator stays"


# Mistakes


def without_end() -> Any:
    other = deepcopy(tokenizer())
    other.eos_token = None
    return other


LONGEST = max(len(request.prompt) for request in made().requests)
MISTAKES: dict[str, tuple[Callable[[], object], type[UserError], str, str]] = {
    "language": (
        lambda: made(translation_spec("fr-en", "fr-de")),
        CorpusError,
        "evaluation.translation.pairs: 'de': ",
        "not in the corpus 'numbers'; it has en, fr, sw",
    ),
    "source": (
        lambda: made(translation_spec("de-fr")),
        CorpusError,
        "evaluation.translation.pairs: 'de': ",
        "not in the corpus",
    ),
    "shots": (
        lambda: made(translation_spec(shots=19)),
        CorpusError,
        "evaluation.translation.shots: 19: ",
        "the corpus 'numbers' has 18 lines for calibration; use a smaller number",
    ),
    "lines": (
        lambda: made(translation_spec(lines=7)),
        CorpusError,
        "evaluation.translation.lines: 7: ",
        "the corpus 'numbers' of 24 lines has 6 for selection; use a smaller number",
    ),
    "positions": (
        lambda: made(positions=LONGEST + 8),
        CorpusError,
        "evaluation.translation.shots: 2: fr-en: the prompt of line ",
        f"is {LONGEST} tokens, max_new_tokens is 9; the model takes {LONGEST + 8}: lower either",
    ),
    "end": (lambda: made(by=without_end()), ModelError, "tokenizer: ", "has no end-of-sequence token"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str) -> None:
    make, kind, start, remedy = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).startswith(start)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_fits_just_so_is_taken() -> None:
    assert made(positions=LONGEST + 9).longest_row == LONGEST + 9
    assert len(made(translation_spec(lines=6, shots=18)).requests) == 6
    assert made(by=without_end(), separator="\n").ends == ("\n",)
