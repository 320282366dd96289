"""How many channels of the feed-forward networks a variant keeps, and whether the model can lose them.

Which channels are removed is decided in `mlprune.shards.masking`, by the rules in `mlprune.pruning.channels`.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from mlprune.errors import SpecError
from mlprune.models.feed_forward import FeedForward, find_feed_forward
from mlprune.planning.model_size import ModelSize
from mlprune.pruning.channels import kept_channels
from mlprune.shards.masking import ChannelPlan
from mlprune.spec.variants import Variant


def check_channels(
    config: PretrainedConfig, model_size: ModelSize, variants: Iterable[Variant]
) -> FeedForward | None:
    """Return the network whose channels the variants remove. Raises SpecError if they cannot."""
    found = None
    cut = dict.fromkeys((variant.pattern, variant.sparsity) for variant in variants if variant.pattern.channels)
    for pattern, sparsity in cut:
        found = found or find_feed_forward(config, "search.pattern", repr(str(pattern)))
        width = _width(model_size, found)
        if pattern.multiple > width:
            raise SpecError("search.pattern", repr(str(pattern)), f"the model has {width} channels in each layer")
        kept = kept_channels(width, sparsity, pattern.multiple)
        if not kept or (sparsity and kept == width):
            problem = "leaves no channel" if not kept else "removes no channel"
            remedy = f"{problem} of {width}, rounded to the nearest multiple; write another, or channels/1"
            raise SpecError("search.sparsity", sparsity, remedy)
    return found


def channel_plan(variant: Variant, model_size: ModelSize, feed_forward: FeedForward | None) -> ChannelPlan | None:
    """Return what the variant removes; None if it removes no channels."""
    if not variant.pattern.channels:
        return None
    assert feed_forward is not None, "check_channels has found it"
    width = _width(model_size, feed_forward)
    return ChannelPlan(feed_forward, kept_channels(width, variant.sparsity, variant.pattern.multiple))


def _width(model_size: ModelSize, feed_forward: FeedForward) -> int:
    """Return the number of channels of a network; it is the same in every layer."""
    return model_size.shapes[f"0.{feed_forward.behind}"][1]
