"""Checks a spec against its model, corpus and machine, and holds all that is known before weights are loaded.

Every user mistake is reported here. Opening the model is in `session`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlprune.console import step
from mlprune.data.batches import Batch
from mlprune.data.calibration import CalibrationSet, build_calibration_set
from mlprune.data.code import open_code
from mlprune.data.corpora import Corpus, open_corpus
from mlprune.errors import ModelError, SpecError
from mlprune.evaluation.build import build_suite, required_languages
from mlprune.evaluation.suite import Suite
from mlprune.models.hollow import Span
from mlprune.models.source import ModelSource, find_model
from mlprune.models.zero import check_disk_access
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
from mlprune.sweep.grid import needs_dense_moments

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
    sets: dict[str, CalibrationSet]  # by demonstration, e.g. mono:fr
    evaluation: Suite | None  # None: nothing is evaluated

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the hash of the model's content.

        It is computed at its first use, because it reads all weights: all other checks come before.
        """
        with step("fingerprint of the model"):
            return self.source.fingerprint()

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

    def recipe(self, variant: Variant) -> MaskRecipe:
        """Return what the workers need to make the variant's masks."""
        sides = tuple(
            tuple((self.sets[str(part)].key, weight) for part, weight in side.parts) for side in variant.sides
        )
        return MaskRecipe(variant, self.spec.calibration.seed, sides)

    @property
    def forecasts(self) -> tuple[tuple[str, str], ...]:
        """Return each evaluated language with the key of its monolingual text, for `MaskRecipe`."""
        return tuple((text.languages[0], self.sets[str(text)].key) for text in forecast_texts(self.spec))

    def sets_of(self, variant: Variant) -> list[CalibrationSet]:
        """Return the calibration sets that the variant reads, in the order of its recipe's keys."""
        by_key = {calibration.key: calibration for calibration in self.sets.values()}
        return [by_key[key] for key in self.recipe(variant).keys]

    def dense_sets(self, variants: Iterable[Variant]) -> dict[str, CalibrationSet]:
        """Return the sets that must pass the dense model for the variants' masks and forecasts, in one order."""
        names = dense_demonstrations(variants, forecast_texts(self.spec) if self.evaluation else ())
        return {name: self.sets[name] for name in sorted(map(str, names))}

    def result_key(self, variant: Variant | None) -> str:
        """Return the content hash of all that a trial's numbers depend on; `variant` None is the dense model."""
        assert self.evaluation is not None
        content = [FORMAT, self.fingerprint, str(self.model_size.dtype), self.evaluation.key]
        if variant is not None:
            recipe = self.recipe(variant)
            content += [variant.key, *(f"{key}={share}" for side in recipe.sides for key, share in side)]
            content += [str(recipe.seed)] if variant.score.name == "random" else []
        return hashlib.sha256(" ".join(content).encode()).hexdigest()[:24]


def forecast_texts(spec: SweepSpec) -> tuple[Demonstration, ...]:
    """Return the monolingual text of each language of the evaluation, on which damage is forecast."""
    return tuple(Demonstration("mono", (code,)) for code in spec.evaluation.perplexity.languages)


def dense_demonstrations(variants: Iterable[Variant], texts: Sequence[Demonstration]) -> set[Demonstration]:
    """Return the demonstrations that pass the dense model: those that masks are made from, and `texts`."""
    variants = list(variants)
    read = {part for variant in variants if needs_dense_moments(variant) for part in variant.demonstrations}
    return read.union(texts) if variants else read


def prepare(spec: SweepSpec, variants: Iterable[Variant], evaluate: bool = True) -> Prepared:
    """Check the spec against model and corpus, tokenise, and plan the shards. Loads no weights.

    With `evaluate` False nothing is evaluated, so the corpus may lack the evaluation's languages. Raises UserError
    for the first mistake.
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
    model_size = measure_model(source.config(), source.dtype(spec.model.dtype), source.name)
    for pattern in dict.fromkeys(variant.pattern for variant in variants):
        check_pattern(model_size, pattern, "search.pattern")
    sets, suite = _tokenise(spec, variants, source, model_size, evaluate)
    machine = cluster_machine(spec.pipeline.wait_minutes) or with_disk(this_machine(), spec.offload_folder)
    plan = make_plan(model_size, _work(spec, variants, sets, suite), machine, spec.pipeline, source.name)
    if plan.reason:
        logger.info("  residency: %s", plan.reason)
    if plan.residency.offload == "nvme" and not cluster_is_running():
        check_folder(spec.offload_folder, "pipeline.offload_folder", spec.offload_folder)
        check_disk_access(machine.device)
    return Prepared(spec, source, model_size, machine, plan, sets, suite)


def _tokenise(
    spec: SweepSpec, variants: Sequence[Variant], source: ModelSource, model_size: ModelSize, evaluate: bool
) -> tuple[dict[str, CalibrationSet], Suite | None]:
    """Return the calibration sets that the variants need, by demonstration, and the evaluation's tasks."""
    demonstrations = dict.fromkeys(part for variant in variants for part in variant.demonstrations)
    if variants and evaluate:
        demonstrations |= dict.fromkeys(forecast_texts(spec))
    languages = [code for part in demonstrations for code in part.languages]
    languages += required_languages(spec.evaluation) if evaluate else ()
    if not demonstrations and not evaluate:
        return {}, None
    if demonstrations:
        _check_positions(spec, model_size)
    corpus = open_corpus(spec.calibration.corpus, dict.fromkeys(languages)) if languages else None
    tokenizer = source.tokenizer()
    sets = _calibration_sets(spec.calibration, demonstrations, corpus, tokenizer, model_size)
    suite = None
    if evaluate:
        assert corpus is not None
        suite = build_suite(spec, corpus, tokenizer, model_size.positions, model_size.has_experts)
    batches = [batch for calibration in sets.values() for batch in calibration.batches]
    batches += suite.rows.batches if suite else ()
    _check_vocabulary(source, model_size, batches)
    return sets, suite


def _calibration_sets(
    options: CalibrationSpec,
    demonstrations: Iterable[Demonstration],
    corpus: Corpus | None,
    tokenizer: PreTrainedTokenizerBase,
    model_size: ModelSize,
) -> dict[str, CalibrationSet]:
    check_template(options.template, "calibration.template", needed=["text"], optional=["language"])
    code = open_code(options.code) if any(part.kind == "code" for part in demonstrations) else None
    return {
        str(part): build_calibration_set(
            corpus,
            part,
            tokenizer,
            samples=options.samples,
            shots=options.shots,
            max_tokens=options.max_tokens,
            seed=options.seed,
            pad_free=model_size.has_experts,
            template=options.template,
            separator=options.separator,
            count_padding=options.count_padding,
            code=code,
        )
        for part in demonstrations
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
    spec: SweepSpec, variants: Sequence[Variant], sets: Mapping[str, CalibrationSet], suite: Suite | None
) -> Work:
    """Count the work from the real token counts of the calibration sets and the evaluation."""
    tasks, rows = (suite.pipeline_tasks, suite.rows.batches) if suite else ((), ())
    lengths = [batch.input_ids.shape[1] for calibration in sets.values() for batch in calibration.batches]
    lengths += [*(batch.input_ids.shape[1] for batch in rows), *(task.longest_row for task in tasks)]
    return build_work(
        variants,
        {name: _tokens(calibration.batches) for name, calibration in sets.items()},
        set(map(str, dense_demonstrations(variants, forecast_texts(spec) if suite else ()))),
        evaluation=_tokens(rows) + sum(task.tokens for task in tasks),
        longest=max(lengths, default=0),
        written=max((task.cached_tokens for task in tasks), default=0),
    )


def _tokens(batches: Iterable[Batch]) -> int:
    """Return the tokens of the batches, padding included."""
    return sum(batch.input_ids.numel() for batch in batches)
