"""Tasks of lm-evaluation-harness, answered by a masked model in shards, against the harness's own `hf` model."""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from ray import cloudpickle

from mlprune.errors import SpecError
from mlprune.evaluation.harness.loading import SAMPLES, build_harness, load_tasks, task_manager
from mlprune.evaluation.harness.task import Harness, task_language
from mlprune.evaluation.items import Items, metrics_of
from mlprune.models.source import ModelSource
from tests.harnessed import ALL_OWN, POSITIONS, hf, masked, model, own, silence
from tests.tiny import tokenizer
from tests.work import RANDOM

__all__ = ["hf", "model", "own"]  # fixtures
DOCUMENTS = 12
SAMPLED = {
    **{f"sample_xwinograd_{code}": count for code, count in (("en", 200), ("fr", 83), ("pt", 200), ("ru", 200))},
    **{f"sample_xcopa_{code}": 60 for code in ("id", "it", "sw", "th", "tr", "vi", "zh")},
}


def loaded(*names: str, path: Path | None = None, items: int | None = None, positions: int = POSITIONS) -> Harness:
    return build_harness(names, str(path) if path else None, items, tokenizer(), positions, False)


def values_of_hf(hf: Any, names: Sequence[str], path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Of the harness's own run of tasks: (task, metric or metric.filter) -> document -> value."""
    with silence():
        manager = task_manager(names, str(path) if path else None)
        given = {"limit": DOCUMENTS, "bootstrap_iters": 0, "log_samples": True}
        samples = lm_eval.simple_evaluate(hf, tasks=list(names), task_manager=manager, **given)["samples"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for task, told in samples.items():
        several = len({one["filter"] for one in told}) > 1
        for one in told:
            for metric in one["metrics"]:
                name = f"{metric}.{one['filter']}" if several else metric
                found.setdefault((task, name), {})[str(one["doc_id"])] = one[metric]
    return found


def as_mapping(items: Sequence[Items]) -> dict[tuple[str, str], dict[str, float]]:
    return {(one.task, one.metric): dict(zip(one.ids, one.columns["value"], strict=True)) for one in items}


@pytest.mark.parametrize("shards", [1, 2])
def test_metrics_equal_those_of_hf(shards: int, hf: Any, model: ModelSource, own: Path, tmp_path: Path) -> None:
    names = ("sample_xwinograd_fr", "own_all")
    made = loaded(*names, path=own, items=DOCUMENTS)
    assert made.tasks == ("sample_xwinograd_fr", *ALL_OWN)
    with masked(tmp_path, model, shards) as pipeline:
        dense = made.run(pipeline, None)
        mine = as_mapping(made.run(pipeline, RANDOM.key))
        assert mine == as_mapping(made.run(pipeline, RANDOM.key))
    assert not any(asked.resps for task in made._loaded for asked in task.instances), (
        "asking leaves nothing behind"
    )
    theirs = values_of_hf(hf, names, own)
    of_sets = {("own_choice_fr", "f1"), ("own_documents", "word_perplexity"), ("own_ending", "perplexity")}
    assert theirs.keys() - mine.keys() == of_sets
    for key, values in mine.items():
        assert values.keys() == theirs[key].keys() == {str(number) for number in range(DOCUMENTS)}
        if key == ("own_documents", "bits_per_byte"):
            expected = {number: -nll / size / 0.6931471805599453 for number, (nll, size) in theirs[key].items()}
            assert values == pytest.approx(expected, rel=1e-5)
        else:
            assert values == theirs[key], key
    assert as_mapping(dense) != mine
    assert {0.0, 1.0} <= {value for key in mine for value in mine[key].values() if key[0] == "own_text"}


def test_items_have_task_language_and_metric(own: Path) -> None:
    class Zeros:
        """Knows nothing."""

        def likelihood_and_greedy(self, rows: Any, variant: Any, progress: Any) -> list[tuple[float, bool]]:
            return [(1.0, False)] * rows.count

        def generate(self, prompts: Sequence[Any], *_: Any) -> list[list[int]]:
            return [[5]] * len(prompts)

    pipeline: Any = Zeros()
    items = loaded("own_choice_fr", "own_text", "sample_xwinograd_ru", path=own, items=4).run(pipeline, None)
    assert [(one.task, one.language, one.metric) for one in items] == [
        ("own_choice_fr", "fr", "acc"),
        ("own_choice_fr", "fr", "acc_norm"),
        ("own_text", "", "exact_match.first"),
        ("own_text", "", "exact_match.last"),
        ("sample_xwinograd_ru", "ru", "acc"),
    ]
    names = ("xnli_fr", "xwinograd_jp", "arc_easy", "fr", "flores_eng")
    assert [task_language(name) for name in names] == ["fr", "", "", "", ""], "jp is a country"
    assert metrics_of(items)["sample_xwinograd_ru.acc"] == sum(items[-1].columns["value"]) / 4


def test_sizes_for_the_plan(own: Path) -> None:
    likelihoods = loaded("sample_xwinograd_en", "own_documents", path=own)
    assert likelihoods.cached_tokens == 0
    assert likelihoods.longest_row == POSITIONS + 1, "a long document's windows; their last token is only told"
    assert likelihoods.tokens == sum(batch.input_ids.numel() for batch in likelihoods.requests.rows.batches)
    text = loaded("own_text", path=own)
    prompts = [len(one.prompt) for one in text.requests.generations.values()]
    assert text.longest_row == max(prompts) + 8 == POSITIONS, "the longest prompt leaves room for its answer"
    assert text.longest_row <= text.cached_tokens <= len(prompts) * text.longest_row
    assert sum(prompts) <= text.tokens <= len(prompts) * max(prompts)


def test_the_key_is_of_the_content(own: Path) -> None:
    keys = [loaded(*ALL_OWN, path=own, items=items).key for items in (None, None, 5)]
    keys.append(build_harness(ALL_OWN, str(own), None, tokenizer(), 60, False).key)
    lines = (own / "test.jsonl").read_text()
    (own / "test.jsonl").write_text(lines.replace('"right": 0', '"right": 1', 1))
    keys.append(loaded(*ALL_OWN, path=own).key)
    text = (own / "own_text.yaml").read_text()
    (own / "own_text.yaml").write_text(text.replace('until: ["\\n"]', 'until: ["a"]'))
    keys.append(loaded(*ALL_OWN, path=own).key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_a_pickled_harness_needs_no_files(own: Path, model: ModelSource, tmp_path: Path) -> None:
    made = loaded("own_all", "sample_xcopa_sw", path=own, items=5)
    assert not [name for name in sys.modules if name.startswith(str(own))], "another process cannot import it"
    pickled = cloudpickle.dumps(made)
    assert b".arrow" not in pickled, "files of this machine"
    assert b"never shown" not in pickled, "all the documents that shots may be drawn from"
    shutil.rmtree(own)
    again = cloudpickle.loads(pickled)
    assert (again.key, again.tasks, again.tokens) == (made.key, made.tasks, made.tokens)
    with masked(tmp_path, model, shards=1) as pipeline:
        assert as_mapping(again.run(pipeline, None)) == as_mapping(made.run(pipeline, None))


# the tasks that come with the package


@pytest.fixture(scope="module")
def samples() -> Mapping[str, Any]:
    made = build_harness(list(SAMPLED), None, None, tokenizer(), 512, False)
    return {task.task_name: task for task in made._loaded}


def test_sample_documents(samples: Mapping[str, Any]) -> None:
    for name, count in SAMPLED.items():
        asked = samples[name].instances
        assert len(asked) == 2 * count, "two choices each"
        answers = [instance.doc["answer" if "xwinograd" in name else "label"] for instance in asked[::2]]
        # as often as in the source
        firsts = {"sample_xwinograd_fr": 42, "sample_xwinograd_ru": 102}.get(name, 33 if count == 60 else 100)
        assert Counter(answers) in ({"1": firsts, "2": count - firsts}, {0: firsts, 1: count - firsts})
    # as in the source: the pronoun "they", and the Russian one that the source writes with its full stop
    first = [instance.args for instance in samples["sample_xwinograd_en"].instances[:2]]
    before = "The city councilmen refused the demonstrators a permit because"
    assert first == [
        (f"{before} The city councilmen", " feared violence."),
        (f"{before} the demonstrators", " feared violence."),
    ]
    doc = samples["sample_xwinograd_ru"].instances[2 * 129].doc
    assert doc["sentence"].endswith("поэтому он передумал и включил _.")
    assert (doc["option1"], doc["option2"], doc["answer"]) == ("пылесос", "телевизор", "1")
    assert samples["sample_xcopa_it"].instances[1].args == (
        "L'oggetto era incartato nella plastica bollata perché",
        " era piccolo.",
    )


@pytest.mark.parametrize("name", ["sample_xwinograd_pt", "sample_xcopa_th"])
def test_samples_have_the_requests_and_metrics_of_the_stock_tasks(name: str, samples: Mapping[str, Any]) -> None:
    stock = name.removeprefix("sample_")
    file = "default_th.yaml" if "xcopa" in name else f"{stock}.yaml"
    settings = load_yaml(Path(lm_eval.__file__).parent / "tasks" / stock[:-3] / file)
    data = {"test": str(SAMPLES / f"{stock}.jsonl"), "validation": str(SAMPLES / f"{stock}.jsonl")}
    settings |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
    with silence():
        task = task_manager([name], None).load([settings])["tasks"][stock]
        task.set_fewshot_seed(0)
        task.build_all_requests()
    ours = samples[name]
    assert [instance.args for instance in task.instances] == [instance.args for instance in ours.instances]
    draw = random.Random(8)
    for instance in ours.instances[::2]:
        answers = [(draw.random(), False), (draw.random(), False)]
        assert task.process_results(instance.doc, answers) == ours.process_results(instance.doc, answers)
    assert task.aggregation() == ours.aggregation()


# mistakes


def refused(*names: str, path: Path | None = None, positions: int = POSITIONS) -> SpecError:
    with pytest.raises(SpecError) as caught:
        loaded(*names, path=path, positions=positions)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_set", "its metrics (bleu) are of a whole set"),
        (
            "own_sampling",
            "needs text generated with {'do_sample': True, 'temperature': 0.5, 'until': []}; only greedy",
        ),
        ("own_lacking", "cannot be loaded ("),
        ("own_image", "images"),
        ("own_code", "runs code"),
    ],
)
def test_an_unsupported_task_is_refused(name: str, words: str, own: Path) -> None:
    error = refused("sample_xwinograd_fr", name, path=own)
    assert (error.key, error.value) == ("evaluation.tasks[1]", repr(name))
    assert words in error.remedy


def test_an_unknown_task_and_one_that_cannot_be_downloaded() -> None:
    """Both look through all that the harness has, which takes seconds."""
    with silence():
        manager = task_manager(["xwinograd_fr"], None)
        with pytest.raises(SpecError) as unknown:
            load_tasks(manager, "sample_xwinograd_fra", "evaluation.tasks[0]")
        with pytest.raises(SpecError) as unreachable:
            load_tasks(manager, "xwinograd_fr", "evaluation.tasks[1]")
    assert unknown.value.key == "evaluation.tasks[0]"
    assert "similar names: sample_xwinograd_fr, " in unknown.value.remedy
    assert "Muennighoff/xwinograd" in unreachable.value.remedy
    assert "evaluation.task_path" in unreachable.value.remedy
    assert "\n" not in str(unreachable.value)


def test_documents_that_do_not_match_their_task(own: Path) -> None:
    """A later document lacks what the first has, which is all that the harness looks at when it loads."""
    rows = [json.loads(line) for line in (own / "test.jsonl").read_text().splitlines()]
    rows[3]["choices"] = None
    (own / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "its documents do not match it (" in refused("own_choice_fr", path=own).remedy


def test_no_such_folder_of_tasks(tmp_path: Path) -> None:
    error = refused("sample_xwinograd_fr", path=tmp_path / "nowhere")
    assert error.key == "evaluation.task_path"
