"""`mlprune plan`: where a model is held on given machines, how long a sweep takes there, and what would help.

Only the model's configuration is read: no weights, tokenizer or corpus. So token counts are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mlprune.console import size_text
from mlprune.errors import ModelError, SpecError
from mlprune.evaluation.build import MEASURING_LINES
from mlprune.models.source import find_model
from mlprune.planning.forecast import Phase, forecast
from mlprune.planning.machine import HOST_TO_DEVICE, UNKNOWN_GPU_FLOPS, Machine, measure_flops, this_machine
from mlprune.planning.model_size import ModelSize, measure_model
from mlprune.planning.planner import Plan, largest_node_sum, make_plan
from mlprune.planning.work import Work, build_work
from mlprune.runtime.nodes import cluster_machine
from mlprune.spec.schema import PipelineSpec, SweepSpec
from mlprune.spec.variants import MEASURED
from mlprune.sweep.grid import variants_of
from mlprune.sweep.mixtures import evaluated_trials, forecast_trials, mixture_searches
from mlprune.sweep.set_names import dense_set_names, set_names

TOKENS_PER_LINE = 64  # news text; a language that the tokenizer covers badly takes several times as many
MAX_NODES = 64  # when looking for a number of nodes that would help


@dataclass(frozen=True)
class MachineOptions:
    """The machines as the command line describes them; None: option not used."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu_memory: int | None = None
    host_memory: int | None = None
    host_to_device: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class ScalePlan:
    """A model planned on machines. `plan` is None if it does not fit; `reason` then says why."""

    name: str
    model_size: ModelSize
    work: Work
    machine: Machine
    plan: Plan | None
    reason: str
    phases: tuple[Phase, ...]
    changes: tuple[str, ...]  # changes that would make it fit, or avoid offloading


def plan_scale(spec: SweepSpec, options: MachineOptions) -> ScalePlan:
    """Plan the spec on the machines. Raises UserError for a mistake in either."""
    source = find_model(
        spec.model.path,
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        weights=False,
    )
    model = measure_model(source.config(), source.dtype(spec.model.dtype), source.name)
    machine = _machine(options, model.dtype)
    work = _estimated_work(spec, model)
    try:
        plan, reason = make_plan(model, work, machine, spec.pipeline, source.name), ""
    except ModelError as error:
        plan, reason = None, error.remedy
    phases = tuple(forecast(model, work, plan, machine)) if plan else ()
    resident = plan is not None and plan.residency.offload is None
    changes = () if resident else tuple(_changes(model, work, machine, spec.pipeline, plan))
    return ScalePlan(source.name, model, work, machine, plan, reason, phases, changes)


def _machine(options: MachineOptions, dtype: torch.dtype) -> Machine:
    """Return the described machines; without a description the running cluster, or else this machine."""
    description = (options.nodes, options.gpus_per_node, options.gpu_memory, options.host_memory)
    if any(value is not None for value in description):
        machine = _described_machine(options)
    else:
        machine = cluster_machine(launch=False) or this_machine()
    return replace(
        machine,
        host_to_device=options.host_to_device or machine.host_to_device,
        flops=options.flops or machine.flops or measure_flops(dtype),
    )


def _described_machine(options: MachineOptions) -> Machine:
    gpus = options.gpus_per_node or 0
    if gpus and options.gpu_memory is None:
        raise SpecError("--gpu-memory", None, "missing; give the memory of one GPU, e.g. --gpu-memory 80GiB")
    if options.host_memory is None:
        raise SpecError("--host-memory", None, "missing; give the memory of one node, e.g. --host-memory 1TiB")
    return Machine(
        nodes=options.nodes or 1,
        gpus=gpus,
        gpu_memory=options.gpu_memory or 0,
        host_memory=options.host_memory,
        host_to_device=HOST_TO_DEVICE,
        flops=UNKNOWN_GPU_FLOPS if gpus else 0.0,
    )


def _estimated_work(spec: SweepSpec, model: ModelSize) -> Work:
    """Estimate the work of the spec: every prompt has the maximum length, every evaluation line the usual one."""
    searches = mixture_searches(spec.search, spec.calibration.seed)
    variants = (*variants_of(spec.search, spec.calibration.seed), *evaluated_trials(searches))
    dense = dense_set_names(variants, spec, forecasts=True)
    prompt = min(spec.calibration.max_tokens, model.positions or spec.calibration.max_tokens)
    languages = len(spec.evaluation.perplexity.languages)
    lines = spec.evaluation.perplexity.lines * languages
    measured = MEASURING_LINES * languages * any(variant.allocation in MEASURED for variant in variants)
    return build_work(
        variants,
        dict.fromkeys(sorted(dense | set_names(variants)), spec.calibration.samples * prompt),
        dense,
        evaluation=lines * TOKENS_PER_LINE,
        longest=max(prompt, TOKENS_PER_LINE),
        stages=spec.search.has_stages,
        forecast=forecast_trials(searches),
        measuring=measured * TOKENS_PER_LINE,
    )


def _changes(
    model: ModelSize, work: Work, machine: Machine, options: PipelineSpec, plan: Plan | None
) -> Iterator[str]:
    """Yield changes that would make the model fit or, if it fits only offloaded, keep its weights resident."""
    free = options.model_copy(update={"residency": "auto", "offload": None})
    if plan is None and (other := _fits(model, work, machine, free)):
        yield f"pipeline.residency=auto: {other.residency}"
    for nodes in _doubled(machine.nodes):
        more = replace(machine, nodes=nodes)
        if (other := _fits(model, work, more, free)) and not other.residency.offload:
            yield f"{nodes} nodes: {other.residency}, {len(other.spans)} shards"
            break
    for place, kind in (("cpu", "host memory"), ("nvme", "disk")):
        roomy = replace(machine, host_memory=2**60, disk=None)
        wanted = options.model_copy(update={"residency": "zero", "offload": place})
        if plan is None and machine.gpus and (other := _fits(model, work, roomy, wanted)):
            host = largest_node_sum([part.host for part in other.memory], machine, other.residency.ranks)
            disk = largest_node_sum([part.disk for part in other.memory], machine, other.residency.ranks)
            tail = f" and {size_text(disk)} of disk" if disk else ""
            yield f"{size_text(host)} of host memory per node{tail}: zero/{place} ({kind})"
    if plan is None and model.dtype == torch.float32:
        yield "model.dtype=bfloat16: half of the weights' memory"


def _doubled(nodes: int) -> Iterator[int]:
    while (nodes := nodes * 2) <= MAX_NODES:
        yield nodes


def _fits(model: ModelSize, work: Work, machine: Machine, options: PipelineSpec) -> Plan | None:
    try:
        return make_plan(model, work, machine, options, "")
    except (ModelError, SpecError):
        return None
