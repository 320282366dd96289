"""The harness's own `hf` model of a variant, the variant in a pipeline, and tasks such as a user writes."""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from mlprune.commands.prune import prune
from mlprune.data.special_tokens import pad_id
from mlprune.evaluation.harness.encoder import Encoder
from mlprune.evaluation.harness.isolation import seeded_and_silent
from mlprune.evaluation.harness.requests import GenerationRequest, LikelihoodRequest, Requests, Response
from mlprune.models.quiet import quiet_transformers
from mlprune.models.source import ModelSource
from mlprune.shards.pipeline import Pipeline
from mlprune.sweep.masks import make_masks
from tests.tiny import sample
from tests.tiny_models import config, save
from tests.work import RANDOM, opened, ready

POSITIONS = 64  # fewer than the model has: most texts here are longer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """One that does not write one token for ever, as tied random weights do."""
    return save(config("llama", tie_word_embeddings=False), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def hf(model: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The variant as an ordinary checkpoint, in the harness's own model."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    prune(ready(tmp_path_factory.mktemp("store"), model).spec, RANDOM, folder)
    with silence():
        return HFLM(str(folder), batch_size=1, device="cpu", dtype="float32", max_length=POSITIONS)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with seeded_and_silent(), quiet_transformers():
        yield


@contextlib.contextmanager
def masked(storage: Path, model: ModelSource, shards: int) -> Iterator[Pipeline]:
    prepared = ready(storage, model, shards)
    with opened(prepared) as pipeline:
        make_masks(prepared, pipeline, RANDOM)
        yield pipeline


class HarnessModel:
    """Responds to the harness's requests, given as a list, with the dense model (`variant` None) or a variant."""

    def __init__(
        self,
        pipeline: Pipeline,
        variant: str | None,
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        pad_free: bool,
    ) -> None:
        self._pipeline, self._variant, self._pad_free = pipeline, variant, pad_free
        self._encoder, self._pad = Encoder(tokenizer, positions), pad_id(tokenizer)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Response]:
        return self._respond(self._encoder.loglikelihood(requests))

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[Response]:
        return self._respond(self._encoder.loglikelihood_rolling(requests))

    def generate_until(self, requests: Sequence[Instance]) -> list[Response]:
        return self._respond(self._encoder.generate_until(requests))

    def _respond(self, encoded: Sequence[LikelihoodRequest | GenerationRequest]) -> list[Response]:
        return Requests.build(encoded, self._pad, self._pad_free).responses(self._pipeline, self._variant)


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, ("task", n, 1)) for n, given in enumerate(arguments)]


def texts(count: int, seed: int) -> list[str]:
    """Bits of text in three scripts, from one character to several times the positions, cut anywhere."""
    corpus, chosen = sample("en", "fr", "hi"), random.Random(seed)
    lines = [" ".join(corpus.column(code, "x")[10:40]) for code in ("en", "fr", "hi")]
    cuts = [(chosen.choice(lines), chosen.randrange(500), chosen.choice((1, 7, 60, 400))) for _ in range(count)]
    return [line[start : start + length] for line, start, length in cuts]


CODE = """
def text_of(doc):
    return shout(doc["question"])

def shout(text):
    return text.upper()
"""
JSON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
"""
OWN = {
    # few-shot, two filters, text
    "own_text": """
output_type: generate_until
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\S)", group_select: 0}, {function: take_first}]}
  - {name: last, filter: [{function: regex, regex_pattern: "(\\\\S)", group_select: -1}, {function: take_first}]}
""",
    # code of its own, several means, and one metric that is none
    "own_choice_fr": """
output_type: multiple_choice
doc_to_text: !function own.text_of
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: f1}]
""",
    "own_documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_ending": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{letter}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "own_set": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
metric_list: [{metric: bleu}]
""",
    "own_sampling": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
generation_kwargs: {do_sample: true, temperature: 0.5, until: []}
metric_list: [{metric: exact_match}]
""",
    "own_lacking": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{wanting | upper}}"
process_docs: !function own.text_of
""",
    "own_image": """
output_type: generate_until
doc_to_image: question
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
metric_list: [{metric: exact_match}]
""",
    "own_code": """
output_type: generate_until
unsafe_code: true
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
metric_list: [{metric: exact_match}]
""",
}
ALL_OWN = ("own_text", "own_choice_fr", "own_documents", "own_ending")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of a user's own tasks."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = [text + " x" for text in texts(30, 7)]
    rows = [
        {"question": line, "letter": "ाtा"[n % 3], "choices": [line[:4], line[2:9] + "!"], "right": n % 2}
        for n, line in enumerate(lines)
    ]
    for row in rows[20:]:
        row["choices"] = ["never shown"]
    for name, part in (("test", rows[:20]), ("train", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "own.py").write_text(CODE)
    for name, text in OWN.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{JSON.format(folder=folder)}{text}")
    members = "".join(f"  - {name}\n" for name in ALL_OWN)
    (folder / "all.yaml").write_text(f"group: own_all\ntask:\n{members}")
    return folder
