"""A spec, to everything that is known before a weight is loaded; every mistake is answered here."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch

from mlprune.config import SearchSpec, SweepSpec
from mlprune.console import say, step, warn
from mlprune.data.calibration import Batch, CalibrationSet, EvaluationSet, calibration_set, evaluation_set
from mlprune.data.corpora import open_corpus
from mlprune.errors import ModelError, SpecError
from mlprune.models.hollow import Span
from mlprune.models.source import ModelSource, find_model
from mlprune.models.zero import Offload, disk_access, make_disk_ready
from mlprune.pruning.scores import score_named
from mlprune.shards.actors import RayPipeline, local_ray
from mlprune.shards.machine import this_machine, with_disk
from mlprune.shards.masking import Recipe
from mlprune.shards.memory import Work
from mlprune.shards.pipeline import LocalPipeline, Pipeline, Progress, Pruned
from mlprune.shards.planner import Plan, make_plan
from mlprune.shards.shape import ModelShape, check_pattern, model_shape
from mlprune.shards.worker import Setup, ShardWorker
from mlprune.store import FORMAT, MomentStore, ResultStore, check_place
from mlprune.variants import Calibration, Demonstration, Pattern, Variant


def variant_of(calibration: str | None, score: str, sparsity: float, pattern: str, propagation: str) -> Variant:
    """A trial in canonical form, so that what would be the same masks is the same trial.

    A score that reads no moments needs no calibration and no propagation; an n:m pattern fixes the sparsity.
    """
    if not score_named(score).reads_moments:
        calibration, propagation = None, "dense"
    fixed = Pattern.parse(pattern).sparsity
    return Variant(calibration, score, float(sparsity if fixed is None else fixed), pattern, propagation)


def parts_of(variant: Variant) -> tuple[tuple[Demonstration, Fraction], ...]:
    """The demonstrations that the variant is calibrated on, with their weights."""
    return Calibration.parse(variant.calibration).parts if variant.calibration else ()


def variants_of(search: SearchSpec) -> tuple[Variant, ...]:
    """The grid, each different trial once, in the order of the spec. Raises SpecError for an unknown score."""
    for n, name in enumerate(search.score):
        if score_named(name, f"search.score[{n}]").reads_moments and not search.calibration:
            raise SpecError("search.calibration", "[]", f"{name} needs calibration; write [mono:en], say")
    grid = product(
        search.calibration or (None,), search.score, search.sparsity, search.pattern, search.propagation
    )
    return tuple(dict.fromkeys(variant_of(*point) for point in grid))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked, tokenised, cut: ready to load weights."""

    spec: SweepSpec
    source: ModelSource
    shape: ModelShape
    plan: Plan
    sets: dict[str, CalibrationSet]  # by demonstration
    evaluation: EvaluationSet | None  # None where nothing is evaluated

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the model's content. Made when first asked for, after all that can be checked without it."""
        with step("fingerprint of the model"):
            return self.source.fingerprint()

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.plan.spans

    def setup(self) -> Setup:
        """What the workers need. For weights that go to a disk, what writes it is made ready."""
        device, offload = worker_device(), None
        if place := self.plan.holding.offload:
            offload = Offload(place, self.spec.offload_folder, self.shape.packed)
            if place == "nvme":
                with step("making DeepSpeed's disk access ready (compiled once, which takes minutes)"):
                    make_disk_ready(device)
        return Setup(self.source, self.spec.model.dtype, device.type, self.store(), offload)

    def store(self) -> MomentStore:
        return MomentStore(self.spec.storage_folder / "moments", self.fingerprint, str(self.shape.dtype))

    def results(self) -> ResultStore:
        return ResultStore(self.spec.storage_folder / "results")

    def recipe(self, variant: Variant) -> Recipe:
        shares = tuple((self.sets[str(part)].key, weight) for part, weight in parts_of(variant))
        return Recipe(variant, self.spec.calibration.seed, shares)

    def sets_of(self, variant: Variant) -> list[CalibrationSet]:
        return [self.sets[str(part)] for part, _ in parts_of(variant)]

    def result_key(self, variant: Variant | None) -> str:
        """A content hash of all that a trial's numbers depend on; `variant` None is the dense model."""
        assert self.evaluation is not None
        content = [FORMAT, self.fingerprint, str(self.shape.dtype), self.evaluation.key]
        if variant is not None:
            recipe = self.recipe(variant)
            content += [variant.key, *(f"{key}={share}" for key, share in recipe.parts)]
            content += [str(recipe.seed)] if variant.score == "random" else []
        return hashlib.sha256(" ".join(content).encode()).hexdigest()[:24]


def worker_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(spec: SweepSpec, variants: Iterable[Variant], evaluate: bool = True) -> Prepared:
    """Check the spec against model and corpus; tokenise; cut the model into shards. Loads no weights.

    `evaluate` False: nothing will be evaluated, so the corpus need not have the evaluation's languages.
    """
    variants = list(variants)
    check_place(spec.storage_folder, "storage", spec.storage)
    source = find_model(
        spec.model.path,
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        allow_pickle=spec.model.allow_pickle,
        progress=step,
    )
    config = source.config()
    shape = model_shape(config, source.dtype(spec.model.dtype), source.name)
    for pattern in dict.fromkeys(variant.pattern for variant in variants):
        check_pattern(shape, Pattern.parse(pattern), "search.pattern")
    sets, evaluation = _text(spec, variants, source, shape, evaluate)
    machine = with_disk(this_machine(), spec.offload_folder)
    plan = make_plan(shape, _work(variants, sets, evaluation), machine, spec.pipeline, source.name)
    if plan.why:
        say(f"  residency: {plan.why}")
    if plan.holding.offload == "nvme":
        check_place(spec.offload_folder, "pipeline.offload_folder", spec.offload_folder)
        disk_access(worker_device())
    return Prepared(spec, source, shape, plan, sets, evaluation)


def _text(
    spec: SweepSpec, variants: Sequence[Variant], source: ModelSource, shape: ModelShape, evaluate: bool
) -> tuple[dict[str, CalibrationSet], EvaluationSet | None]:
    """Every calibration set that the variants need, by demonstration, and the evaluation set."""
    demonstrations = dict.fromkeys(part for variant in variants for part, _ in parts_of(variant))
    asked = spec.evaluation.perplexity
    needed = [code for part in demonstrations for code in part.languages]
    needed += asked.languages if evaluate else ()
    if not needed:
        return {}, None
    if demonstrations:
        _check_positions(spec, shape)
    corpus = open_corpus(spec.calibration.corpus, dict.fromkeys(needed))
    tokenizer = source.tokenizer()
    sets = {
        str(part): calibration_set(
            corpus,
            part,
            tokenizer,
            samples=spec.calibration.samples,
            shots=spec.calibration.shots,
            max_tokens=spec.calibration.max_tokens,
            seed=spec.calibration.seed,
            pad_free=shape.has_experts,
        )
        for part in demonstrations
    }
    evaluation = None
    if evaluate:
        evaluation = evaluation_set(
            corpus,
            asked.languages,
            tokenizer,
            lines=asked.lines,
            max_positions=shape.positions,
            pad_free=shape.has_experts,
        )
    passes = [made.batches for made in sets.values()] + ([evaluation.batches] if evaluation else [])
    _check_vocabulary(source, shape, (batch for batches in passes for batch in batches))
    return sets, evaluation


def _check_vocabulary(source: ModelSource, shape: ModelShape, batches: Iterable[Batch]) -> None:
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= shape.vocabulary:
        remedy = f"its tokenizer makes token {largest}, its embedding has {shape.vocabulary}: not a pair"
        raise ModelError("model.path", repr(source.name), remedy)


def _work(
    variants: Sequence[Variant], sets: Mapping[str, CalibrationSet], evaluation: EvaluationSet | None
) -> Work:
    def tokens(batches: Iterable[Batch]) -> int:
        return sum(batch.input_ids.numel() for batch in batches)

    passes = [made.batches for made in sets.values()] + ([evaluation.batches] if evaluation else [])
    sequential = [variant for variant in variants if variant.propagation == "sequential"]
    together = [sum(tokens(sets[str(part)].batches) for part, _ in parts_of(variant)) for variant in sequential]
    return Work(
        calibration=tuple(tokens(made.batches) for made in sets.values()),
        evaluation=tokens(evaluation.batches) if evaluation else 0,
        longest=max((batch.input_ids.shape[1] for batches in passes for batch in batches), default=0),
        variants=len(variants),
        sequential=len(sequential),
        sequential_tokens=max(together, default=0),
    )


def _check_positions(spec: SweepSpec, shape: ModelShape) -> None:
    asked = spec.calibration.max_tokens
    if shape.positions is not None and asked > shape.positions:
        remedy = f"the model takes {shape.positions} tokens at most"
        raise SpecError("calibration.max_tokens", asked, remedy)


@contextmanager
def open_pipeline(prepared: Prepared) -> Iterator[Pipeline]:
    """The model, loaded, for as long as the block runs: one shard in this process, more as Ray actors."""
    if len(prepared.spans) * prepared.plan.holding.ranks > 1:
        with open_ray_pipeline(prepared, trial_slots=1) as over_ray:
            yield over_ray
        return
    setup = prepared.setup()
    with step("loading the model"):
        pipeline = LocalPipeline([ShardWorker(setup, prepared.spans[0])], prepared.plan.chunks)
    try:
        yield pipeline
    finally:
        pipeline.close()


@contextmanager
def open_ray_pipeline(prepared: Prepared, trial_slots: int) -> Iterator[RayPipeline]:
    """The model as Ray actors, for as long as the block runs; Ray is started if it is not running."""
    setup, ranks = prepared.setup(), prepared.plan.holding.ranks
    with contextlib.ExitStack() as stack:
        with step("starting Ray"):
            stack.enter_context(local_ray(trial_slots))
        each = f", {ranks} ranks each" if ranks > 1 else ""
        with step(f"loading the model into {len(prepared.spans)} shard(s){each}"):
            pipeline = RayPipeline.launch(setup, prepared.spans, prepared.plan.chunks, ranks)
        stack.callback(pipeline.close)
        yield pipeline


def gather(prepared: Prepared, pipeline: Pipeline, variants: Iterable[Variant]) -> None:
    """Have the dense moments that the variants need: from the store, else by one pass for all of them."""
    names = {str(part) for v in variants if v.propagation == "dense" for part, _ in parts_of(v)}
    missing = {}
    for name in prepared.sets.keys() & names:
        complete, corrupt = pipeline.restore(prepared.sets[name].key)
        for file in corrupt:
            warn(f"{file} is corrupt; its moments are gathered again")
        if not complete:
            missing[name] = prepared.sets[name]
    if missing:
        with step(f"calibrating on {', '.join(sorted(missing))}", "batches") as progress:
            pipeline.gather([missing[name] for name in sorted(missing)], progress)


def make_masks(
    prepared: Prepared, pipeline: Pipeline, variant: Variant, progress: Progress | None = None
) -> Pruned:
    """The variant's masks, in the workers. What is dense needs its moments gathered before."""
    recipe = prepared.recipe(variant)
    if variant.propagation == "sequential":
        return pipeline.prune_sequentially(recipe, prepared.sets_of(variant), progress)
    return pipeline.prune(recipe)
