"""A spec, to everything that is known before a weight is loaded; every mistake is answered here."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlprune.console import say, step
from mlprune.data.batches import Batch
from mlprune.data.calibration import CalibrationSet, build_calibration_set
from mlprune.data.code import open_code
from mlprune.data.corpora import Corpus, open_corpus
from mlprune.errors import ModelError, SpecError
from mlprune.evaluation.build import build_suite, required_languages
from mlprune.evaluation.suite import Suite
from mlprune.models.hollow import Span
from mlprune.models.source import ModelSource, find_model
from mlprune.models.zero import disk_access_builder
from mlprune.planning.machine import Machine, this_machine, with_disk
from mlprune.planning.model_size import ModelSize, check_pattern, measure_model
from mlprune.planning.planner import Plan, make_plan
from mlprune.planning.work import Work, build_work
from mlprune.runtime.ray_cluster import cluster_is_running, cluster_machine
from mlprune.shards.masking import MaskRecipe
from mlprune.spec.schema import CalibrationSpec, SweepSpec
from mlprune.spec.templates import check_template
from mlprune.spec.variants import Demonstration, Variant
from mlprune.storage.files import FORMAT, Storage, check_folder, check_storage
from mlprune.storage.moments import MomentStore
from mlprune.storage.results import ResultStore


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked, tokenised, cut: ready to load weights."""

    spec: SweepSpec
    source: ModelSource
    model_size: ModelSize
    machine: Machine  # this one, or the nodes of the cluster that runs
    plan: Plan
    sets: dict[str, CalibrationSet]  # by demonstration
    evaluation: Suite | None  # None where nothing is evaluated

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the model's content. Made when first asked for, after all that can be checked without it."""
        with step("fingerprint of the model"):
            return self.source.fingerprint()

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.plan.spans

    def store(self) -> MomentStore:
        return MomentStore(Storage(self.spec.storage), self.fingerprint, str(self.model_size.dtype))

    def results(self) -> ResultStore:
        return ResultStore(Storage(self.spec.storage))

    def recipe(self, variant: Variant) -> MaskRecipe:
        sides = tuple(
            tuple((self.sets[str(part)].key, weight) for part, weight in side.parts) for side in variant.sides
        )
        return MaskRecipe(variant, self.spec.calibration.seed, sides)

    def sets_of(self, variant: Variant) -> list[CalibrationSet]:
        """The calibration sets that it reads, in the order of its recipe's keys."""
        by_key = {made.key: made for made in self.sets.values()}
        return [by_key[key] for key in self.recipe(variant).keys]

    def result_key(self, variant: Variant | None) -> str:
        """A content hash of all that a trial's numbers depend on; `variant` None is the dense model."""
        assert self.evaluation is not None
        content = [FORMAT, self.fingerprint, str(self.model_size.dtype), self.evaluation.key]
        if variant is not None:
            recipe = self.recipe(variant)
            content += [variant.key, *(f"{key}={share}" for side in recipe.sides for key, share in side)]
            content += [str(recipe.seed)] if variant.score.name == "random" else []
        return hashlib.sha256(" ".join(content).encode()).hexdigest()[:24]


def prepare(spec: SweepSpec, variants: Iterable[Variant], evaluate: bool = True) -> Prepared:
    """Check the spec against model and corpus; tokenise; cut the model into shards. Loads no weights.

    `evaluate` False: nothing will be evaluated, so the corpus need not have the evaluation's languages.
    """
    variants = list(variants)
    check_storage(spec.storage)
    source = find_model(
        spec.model.path,
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        allow_pickle=spec.model.allow_pickle,
        progress=step,
    )
    config = source.config()
    size = measure_model(config, source.dtype(spec.model.dtype), source.name)
    for pattern in dict.fromkeys(variant.pattern for variant in variants):
        check_pattern(size, pattern, "search.pattern")
    sets, evaluation = _text(spec, variants, source, size, evaluate)
    machine = cluster_machine(spec.pipeline.wait_minutes) or with_disk(this_machine(), spec.offload_folder)
    plan = make_plan(size, _work(variants, sets, evaluation), machine, spec.pipeline, source.name)
    if plan.reason:
        say(f"  residency: {plan.reason}")
    if plan.residency.offload == "nvme" and not cluster_is_running():
        check_folder(spec.offload_folder, "pipeline.offload_folder", spec.offload_folder)
        disk_access_builder(machine.device)
    return Prepared(spec, source, size, machine, plan, sets, evaluation)


def _text(
    spec: SweepSpec, variants: Sequence[Variant], source: ModelSource, size: ModelSize, evaluate: bool
) -> tuple[dict[str, CalibrationSet], Suite | None]:
    """Every calibration set that the variants need, by demonstration, and what the model is asked."""
    demonstrations = dict.fromkeys(part for variant in variants for part in variant.demonstrations)
    needed = [code for part in demonstrations for code in part.languages]
    needed += required_languages(spec.evaluation) if evaluate else ()
    if not demonstrations and not evaluate:
        return {}, None
    if demonstrations:
        _check_positions(spec, size)
    corpus = open_corpus(spec.calibration.corpus, dict.fromkeys(needed)) if needed else None
    tokenizer = source.tokenizer()
    sets = _calibration_sets(spec.calibration, demonstrations, corpus, tokenizer, size)
    suite = None
    if evaluate:
        assert corpus is not None
        suite = build_suite(spec, corpus, tokenizer, size.positions, size.has_experts)
    batches = [batch for made in sets.values() for batch in made.batches] + (
        [*suite.rows.batches] if suite else []
    )
    _check_vocabulary(source, size, batches)
    return sets, suite


def _calibration_sets(
    asked: CalibrationSpec,
    demonstrations: Iterable[Demonstration],
    corpus: Corpus | None,
    tokenizer: Any,
    size: ModelSize,
) -> dict[str, CalibrationSet]:
    check_template(asked.template, "calibration.template", needed=["text"], optional=["language"])
    code = open_code(asked.code) if any(part.kind == "code" for part in demonstrations) else None
    return {
        str(part): build_calibration_set(
            corpus,
            part,
            tokenizer,
            samples=asked.samples,
            shots=asked.shots,
            max_tokens=asked.max_tokens,
            seed=asked.seed,
            pad_free=size.has_experts,
            template=asked.template,
            separator=asked.separator,
            count_padding=asked.count_padding,
            code=code,
        )
        for part in demonstrations
    }


def _check_vocabulary(source: ModelSource, size: ModelSize, batches: Iterable[Batch]) -> None:
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= size.vocabulary:
        remedy = f"its tokenizer makes token {largest}, its embedding has {size.vocabulary}: not a pair"
        raise ModelError("model.path", repr(source.name), remedy)


def _work(variants: Sequence[Variant], sets: Mapping[str, CalibrationSet], suite: Suite | None) -> Work:
    """Count the work from the real token counts of the calibration sets and the evaluation."""
    tasks, rows = (suite.pipeline_tasks, suite.rows.batches) if suite else ((), ())
    lengths = [batch.input_ids.shape[1] for made in sets.values() for batch in made.batches]
    lengths += [*(batch.input_ids.shape[1] for batch in rows), *(task.longest_row for task in tasks)]
    return build_work(
        variants,
        {name: _tokens(made.batches) for name, made in sets.items()},
        evaluation=_tokens(rows) + sum(task.tokens for task in tasks),
        longest=max(lengths, default=0),
        written=max((task.cached_tokens for task in tasks), default=0),
    )


def _tokens(batches: Iterable[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in batches)


def _check_positions(spec: SweepSpec, size: ModelSize) -> None:
    asked = spec.calibration.max_tokens
    if size.positions is not None and asked > size.positions:
        remedy = f"the model takes {size.positions} tokens at most"
        raise SpecError("calibration.max_tokens", asked, remedy)
