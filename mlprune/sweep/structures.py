"""How many units a structured variant keeps, and whether the model can lose them.

Which units are removed is decided in `mlprune.shards.structured_masks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig

from mlprune.errors import SpecError
from mlprune.models.structures import Units, find_units, smaller_config
from mlprune.planning.model_size import ModelSize
from mlprune.pruning.structured import kept_units
from mlprune.shards.masking import UnitPlan
from mlprune.spec.variants import Pattern, Structure, Variant

MULTIPLE = 64  # of a number of channels that matrix products are fast with


def find_structures(
    config: PretrainedConfig, model_size: ModelSize, variants: Iterable[Variant]
) -> Mapping[Structure, Units]:
    """Return the units of each structure that the variants remove. Raises SpecError if they cannot."""
    found: dict[Structure, Units] = {}
    for variant in dict.fromkeys(variants):
        structure = variant.pattern.structure
        if structure is None:
            continue
        units = found.setdefault(structure, find_units(config, structure))
        _check(config, _plan(variant, model_size, units), variant)
    return found


def unit_plan(variant: Variant, model_size: ModelSize, found: Mapping[Structure, Units]) -> UnitPlan | None:
    """Return what the variant removes; None if it removes no units. `found`: see `find_structures`."""
    structure = variant.pattern.structure
    return None if structure is None else _plan(variant, model_size, found[structure])


def _plan(variant: Variant, model_size: ModelSize, units: Units) -> UnitPlan:
    _, width = model_size.shapes[f"0.{units.behind}"]  # the same in every layer
    count = width // units.columns
    return UnitPlan(units, count, kept_units(count, variant.sparsity, _multiple(variant.pattern, count)))


def _multiple(pattern: Pattern, count: int) -> int:
    if pattern.structure == "channels" and not pattern.multiple:
        return MULTIPLE if count % MULTIPLE == 0 else 1
    return pattern.multiple or 1


def _check(config: PretrainedConfig, plan: UnitPlan, variant: Variant) -> None:
    pattern, structure = variant.pattern, variant.pattern.structure
    if pattern.multiple > plan.count:
        raise SpecError("search.pattern", repr(str(pattern)), f"a layer of the model has {plan.count} {structure}")
    if not plan.kept or (variant.sparsity and plan.kept == plan.count):
        what = "leaves none" if not plan.kept else "removes none"
        step = _multiple(pattern, plan.count)
        remedy = f"{what} of the {plan.count} {structure} of a layer, in steps of {step}; write another sparsity"
        raise SpecError("search.sparsity", variant.sparsity, remedy)
    try:
        smaller_config(config, plan.units, plan.kept)
    except Exception as error:  # whatever the family's class checks
        sizes = ", ".join(f"{key}={value}" for key, value in plan.units.config_sizes(plan.kept).items())
        reason = str(error).strip().splitlines()[-1].strip()
        remedy = f"transformers refuses a model with {sizes}: {reason}"
        raise SpecError("search.sparsity", variant.sparsity, remedy) from None
