"""Checks a spec against its model, corpus and machine, and holds all that is known before weights are loaded.

Every user mistake is reported here. Opening the model is in `session`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlprune.console import step
from mlprune.data.batches import Batch
from mlprune.data.calibration import CalibrationSet, build_calibration_set
from mlprune.data.code import open_code
from mlprune.data.corpora import Corpus, open_corpus
from mlprune.errors import ModelError, SpecError
from mlprune.evaluation.build import Evaluation, build_evaluation, build_measuring, required_languages
from mlprune.evaluation.suite import Suite
from mlprune.models.hollow import Span
from mlprune.models.source import ModelSource, find_model
from mlprune.models.structures import Units
from mlprune.models.tensor_check import check_tensors
from mlprune.models.zero import check_disk_access
from mlprune.planning.machine import Machine, this_machine, with_disk
from mlprune.planning.model_size import ModelSize, check_pattern, measure_model
from mlprune.planning.planner import Plan, make_plan
from mlprune.planning.work import Work, build_work
from mlprune.runtime.connection import cluster_is_running
from mlprune.runtime.nodes import cluster_machine
from mlprune.shards.masking import MaskRecipe, Side
from mlprune.spec.calibrations import Demonstration
from mlprune.spec.schema import CalibrationSpec, SweepSpec
from mlprune.spec.templates import check_template
from mlprune.spec.variants import MEASURED, OF_LANGUAGES, Structure, Variant
from mlprune.storage.files import FORMAT, Storage, check_folder, check_storage
from mlprune.storage.moments import MomentStore
from mlprune.storage.results import ResultStore
from mlprune.sweep.mixtures import MixtureSearch, evaluated_trials, forecast_trials
from mlprune.sweep.set_names import SetName, dense_set_names, forecast_set_names, reads_languages, set_names
from mlprune.sweep.structures import find_structures, unit_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked job: everything that is known before weights are loaded."""

    spec: SweepSpec
    source: ModelSource
    model_size: ModelSize
    machine: Machine  # this machine, or the nodes of the running cluster
    plan: Plan
    sets: Mapping[SetName, CalibrationSet]
    evaluation: Evaluation | None  # None: nothing is evaluated
    measuring: Suite | None = None  # on which single pruned layers are measured, if an allocation needs it
    structures: Mapping[Structure, Units] = field(default_factory=dict)  # of which variants remove units

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the hash of the model's content.

        It is computed at its first use, because it reads all weights: all other checks come before.
        """
        with step("fingerprint of the model"):
            return self.source.fingerprint()

    @property
    def suite(self) -> Suite:
        """Return the tasks by which trials are ranked."""
        assert self.evaluation is not None
        return self.evaluation.selection

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return the layers of each shard."""
        return self.plan.spans

    @property
    def dtype_name(self) -> str:
        """Return the dtype as users write it, e.g. bfloat16."""
        return str(self.model_size.dtype).removeprefix("torch.")

    def moment_store(self) -> MomentStore:
        """Return the store of this model's moments."""
        return MomentStore(Storage(self.spec.storage), self.fingerprint, str(self.model_size.dtype))

    def result_store(self) -> ResultStore:
        """Return the store of trial results."""
        return ResultStore(Storage(self.spec.storage))

    def params(self) -> dict[str, object]:
        """Return model and calibration as MLflow parameters."""
        calibration = self.spec.calibration
        return {
            "model": self.spec.model.path,
            "model.fingerprint": self.fingerprint,
            "model.dtype": self.dtype_name,
            "corpus": calibration.corpus,
            "samples": calibration.samples,
            "shots": calibration.shots,
            "max_tokens": calibration.max_tokens,
            "seed": calibration.seed,
        }

    def set_of(self, demonstration: str, seed: int | None = None) -> CalibrationSet:
        """Return a calibration set; `seed` None: of the spec's own seed."""
        return self.sets[demonstration, self.spec.calibration.seed if seed is None else seed]

    def recipe(self, variant: Variant) -> MaskRecipe:
        """Return what the workers need to make the variant's masks."""
        sides = tuple(
            Side(
                tuple((self.set_of(str(part), variant.seed).key, weight) for part, weight in side.parts),
                side.combination,
            )
            for side in variant.sides
        )
        return MaskRecipe(variant, sides, removal=unit_plan(variant, self.model_size, self.structures))

    @property
    def forecasts(self) -> tuple[tuple[str, str], ...]:
        """Return each evaluated language with the key of its monolingual text, for `MaskRecipe`."""
        languages = self.spec.evaluation.perplexity.languages
        return tuple((code, self.set_of(f"mono:{code}").key) for code in languages)

    def sets_of(self, variant: Variant) -> list[CalibrationSet]:
        """Return the calibration sets that the variant reads, in the order of its recipe's keys."""
        by_key = {calibration.key: calibration for calibration in self.sets.values()}
        return [by_key[key] for key in self.recipe(variant).keys]

    def dense_sets(self, variants: Iterable[Variant]) -> dict[SetName, CalibrationSet]:
        """Return the sets that must pass the dense model for the variants' masks and forecasts, in one order."""
        names = dense_set_names(variants, self.spec, forecasts=self.evaluation is not None)
        return {name: self.sets[name] for name in sorted(names)}

    def result_key(self, variant: Variant | None, suite: Suite | None = None) -> str:
        """Return the content hash of all that a trial's numbers depend on; `variant` None is the dense model.

        `suite` None: the tasks by which trials are ranked. This key is also the trial's name in MLflow.
        """
        suite = suite or self.suite
        content = [FORMAT, self.fingerprint, str(self.model_size.dtype), suite.key]
        if variant is not None:
            recipe = self.recipe(variant)
            content += [variant.key, *(f"{key}={share}" for side in recipe.sides for key, share in side.sets)]
            content += [str(variant.seed)] if variant.score.name == "random" else []
            content += ["exact total"] if variant.allocation != "uniform" else []  # owl's was not, once
            content += [self.measuring.key] if self.measuring and variant.allocation in MEASURED else []
            only_forecasts = not suite.likelihood_tasks and not suite.pipeline_tasks
            if only_forecasts or variant.allocation in OF_LANGUAGES:
                content += [f"{code}={key}" for code, key in self.forecasts]
        return hashlib.sha256(" ".join(content).encode()).hexdigest()[:24]


def prepare(
    spec: SweepSpec, variants: Iterable[Variant], evaluate: bool = True, searches: Sequence[MixtureSearch] = ()
) -> Prepared:
    """Check the spec against model and corpus, tokenise, and plan the shards. Loads no weights.

    `searches`: the searches for mixtures beside the variants. With `evaluate` False nothing is evaluated, so the
    corpus may lack the evaluation's languages. Raises UserError for the first mistake.
    """
    forecast, variants = forecast_trials(searches), [*variants, *evaluated_trials(searches)]
    check_storage(spec.storage)
    source = find_model(
        spec.model.path,
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        allow_pickle=spec.model.allow_pickle,
        progress=step,
    )
    model_size = measure_model(source.config(), source.dtype(spec.model.dtype), source.name)
    check_tensors(source)
    for pattern in dict.fromkeys(variant.pattern for variant in variants):
        check_pattern(model_size, pattern, "search.pattern")
    structures = find_structures(source.config(), model_size, [*variants, *forecast])
    sets, evaluation, measuring = _tokenise(spec, variants, source, model_size, evaluate)
    machine = cluster_machine(spec.pipeline.wait_minutes) or with_disk(this_machine(), spec.offload_folder)
    work = _work(spec, variants, forecast, sets, evaluation, measuring)
    plan = make_plan(model_size, work, machine, spec.pipeline, source.name)
    if plan.reason:
        logger.info("  residency: %s", plan.reason)
    if plan.residency.offload == "nvme" and not cluster_is_running():
        check_folder(spec.offload_folder, "pipeline.offload_folder", spec.offload_folder)
        check_disk_access(machine.device)
    return Prepared(spec, source, model_size, machine, plan, sets, evaluation, measuring, structures)


def _tokenise(
    spec: SweepSpec, variants: Sequence[Variant], source: ModelSource, model_size: ModelSize, evaluate: bool
) -> tuple[dict[SetName, CalibrationSet], Evaluation | None, Suite | None]:
    """Return the calibration sets that the variants need, the evaluation's tasks, and the measuring task."""
    names = set_names(variants)
    if reads_languages(variants, evaluate):
        names |= forecast_set_names(spec)
    demonstrations = [(Demonstration.parse(text), seed) for text, seed in sorted(names)]
    languages = [code for part, _ in demonstrations for code in part.languages]
    languages += required_languages(spec.evaluation) if evaluate else ()
    if not demonstrations and not evaluate:
        return {}, None, None
    if demonstrations:
        _check_positions(spec, model_size)
    corpus = open_corpus(spec.calibration.corpus, dict.fromkeys(languages)) if languages else None
    tokenizer = source.tokenizer()
    sets = _calibration_sets(spec.calibration, demonstrations, corpus, tokenizer, model_size)
    evaluation = measuring = None
    if evaluate:
        assert corpus is not None
        evaluation = build_evaluation(spec, corpus, tokenizer, model_size.positions, model_size.has_experts)
    if any(variant.allocation in MEASURED for variant in variants):
        assert corpus is not None
        measuring = build_measuring(spec, corpus, tokenizer, model_size.positions, model_size.has_experts)
    _check_vocabulary(source, model_size, _batches(sets, evaluation, measuring))
    return sets, evaluation, measuring


def _batches(
    sets: Mapping[SetName, CalibrationSet], evaluation: Evaluation | None, measuring: Suite | None
) -> list[Batch]:
    """Return all micro-batches of calibration, evaluation and measuring."""
    suites = (evaluation.selection, evaluation.confirmation, measuring) if evaluation else (measuring,)
    batches = [batch for one in sets.values() for batch in one.batches]
    return batches + [batch for suite in suites if suite for batch in suite.rows.batches]


def _calibration_sets(
    options: CalibrationSpec,
    demonstrations: Iterable[tuple[Demonstration, int]],
    corpus: Corpus | None,
    tokenizer: PreTrainedTokenizerBase,
    model_size: ModelSize,
) -> dict[SetName, CalibrationSet]:
    check_template(options.template, "calibration.template", needed=["text"], optional=["language"])
    code = open_code(options.code) if any(part.kind == "code" for part, _ in demonstrations) else None
    return {
        (str(part), seed): build_calibration_set(
            corpus,
            part,
            tokenizer,
            samples=options.samples,
            shots=options.shots,
            max_tokens=options.max_tokens,
            seed=seed,
            pad_free=model_size.has_experts,
            template=options.template,
            separator=options.separator,
            count_padding=options.count_padding,
            code=code,
        )
        for part, seed in demonstrations
    }


def _check_vocabulary(source: ModelSource, model_size: ModelSize, batches: Iterable[Batch]) -> None:
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= model_size.vocabulary:
        rows = model_size.vocabulary
        remedy = f"its tokenizer returns token {largest}, but its embedding has {rows} rows; fix either"
        raise ModelError("model.path", repr(source.name), remedy)


def _check_positions(spec: SweepSpec, model_size: ModelSize) -> None:
    requested = spec.calibration.max_tokens
    if model_size.positions is not None and requested > model_size.positions:
        remedy = f"the model takes {model_size.positions} tokens at most"
        raise SpecError("calibration.max_tokens", requested, remedy)


def _work(
    spec: SweepSpec,
    variants: Sequence[Variant],
    forecast: Sequence[Variant],
    sets: Mapping[SetName, CalibrationSet],
    evaluation: Evaluation | None,
    measuring: Suite | None,
) -> Work:
    """Count the work from the real token counts of the calibration sets and the evaluation."""
    tasks, rows = (
        (evaluation.selection.pipeline_tasks, evaluation.selection.rows.batches) if evaluation else ((), ())
    )
    lengths = [batch.input_ids.shape[1] for batch in _batches(sets, evaluation, measuring)]
    lengths += [task.longest_row for task in tasks]
    return build_work(
        variants,
        {name: _tokens(calibration.batches) for name, calibration in sets.items()},
        dense_set_names(variants, spec, forecasts=evaluation is not None),
        evaluation=_tokens(rows) + sum(task.tokens for task in tasks),
        longest=max(lengths, default=0),
        written=max((task.cached_tokens for task in tasks), default=0),
        stages=spec.search.has_stages,
        forecast=forecast,
        measuring=_tokens(measuring.rows.batches) if measuring else 0,
    )


def _tokens(batches: Iterable[Batch]) -> int:
    """Return the tokens of the batches, padding included."""
    return sum(batch.input_ids.numel() for batch in batches)
