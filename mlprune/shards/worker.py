"""One shard's work, as a plain class: moments, masks, hidden states and likelihoods of its own layers.

A pass is layer-major: a layer is borrowed once, and sees all its micro-batches before the next is touched.
B: rows of a micro-batch. T: its tokens. H: hidden width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlprune.data.calibration import Batch
from mlprune.errors import ModelError
from mlprune.models.hollow import Span
from mlprune.models.matrices import Observer, matrices
from mlprune.models.replay import Recorded, ReplayModel
from mlprune.models.residency import Resident, masked
from mlprune.models.source import ModelSource
from mlprune.pruning.masks import PackedMask, keep_mask
from mlprune.pruning.moments import Moments, mixed
from mlprune.pruning.scores import score_named
from mlprune.store import CorruptMomentsError, MomentStore
from mlprune.variants import Pattern, Variant

# logits are made for this many tokens at a time: 512 x 256k words x 4 bytes is half a gigabyte
LOGIT_TOKENS = 512


@dataclass(frozen=True)
class Recipe:
    """All that turns moments into masks: the variant, the seed, and which calibration sets in which shares."""

    variant: Variant
    seed: int
    parts: tuple[tuple[str, Fraction], ...] = ()  # calibration set key, weight


@dataclass(frozen=True)
class LayerMasks:
    """What a layer's masks came to: weights dropped of weights, a digest of the bits, matrices left blind."""

    dropped: int
    weights: int
    digest: str
    unseen: tuple[str, ...] = ()  # matrices of experts that no calibration token reached


@dataclass(frozen=True)
class StoredMoments:
    """What the store had: whether all of the shard's layers, and the files that were corrupt."""

    complete: bool
    corrupt: tuple[str, ...] = ()


class ShardWorker:
    """Holds the layers of `span` and what was gathered on them."""

    def __init__(self, source: ModelSource, span: Span, dtype: str, device: str, store: MomentStore) -> None:
        torch.set_num_threads(_threads())
        self.span = span
        with torch.inference_mode():
            self._model = ReplayModel(source, span, source.dtype(dtype), torch.device(device))
        self._logit_tokens = min(LOGIT_TOKENS, self._model.positions or LOGIT_TOKENS)
        self._residency = Resident(self._model.layers)
        self._store = store
        self._gathering: dict[str, dict[int, dict[str, Moments]]] = {}  # passes that are under way
        self._moments: dict[str, dict[int, dict[str, Moments]]] = {}  # of whole passes
        self._masks: dict[str, dict[int, dict[str, PackedMask]]] = {}
        self._summaries: dict[str, list[LayerMasks]] = {}

    def ready(self) -> None:
        """Answers once the layers are loaded, and what was asked before is done."""

    # passes

    @torch.inference_mode()
    def forward(
        self,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor] | None,
        variant: str | None = None,
        gather: str | None = None,
    ) -> list[Tensor]:
        """Pass a chunk through the layers, masked by `variant`; add its moments to the set `gather`.

        `hidden` is what the shard before returned, one [B, T, H] a micro-batch; None on the first shard.
        The last shard returns nothing when it gathers: nobody reads what leaves the last layer then.
        """
        recorded = self._record(batches)
        states = self._entering(recorded, hidden)
        gathered = self._gathering.setdefault(gather, {}) if gather else None
        for index in self.span.layers:
            masks = self._masks[variant][index] if variant else None
            with self._residency.borrow(index, masks) as layer:
                if gathered is None:
                    states = self._run(index, layer, recorded, states)
                    continue
                with Observer(layer) as observer:
                    states = self._run(index, layer, recorded, states, batches, observer)
                gathered[index] = _sum(gathered.get(index), observer.gathered())
        return [] if gather and self.span.is_last else states

    @torch.inference_mode()
    def likelihood(
        self, batches: Sequence[Batch], hidden: Sequence[Tensor] | None, variant: str | None = None
    ) -> list[Tensor]:
        """On the last shard: the negative log-likelihood of each row's tokens after its first, nats, [B]."""
        states = self.forward(batches, hidden, variant)
        return [self._nll(batch, state) for batch, state in zip(batches, states, strict=True)]

    def _record(self, batches: Sequence[Batch]) -> list[Recorded]:
        return [self._model.record(batch.input_ids, batch.attention_mask) for batch in batches]

    def _entering(self, recorded: Sequence[Recorded], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        if hidden is None:
            return [item.embedded_BTH for item in recorded]
        return [state.to(self._model.device) for state in hidden]

    def _run(
        self,
        index: int,
        layer: torch.nn.Module,
        recorded: Sequence[Recorded],
        states: Sequence[Tensor],
        batches: Sequence[Batch] = (),
        observer: Observer | None = None,
    ) -> list[Tensor]:
        out = []
        for number, (item, state) in enumerate(zip(recorded, states, strict=True)):
            if observer is not None:
                observer.keep = _real_tokens(batches[number], self._model.device)
            out.append(self._model.run(layer, state, item.calls[index]))
        return out

    def _nll(self, batch: Batch, state_BTH: Tensor) -> Tensor:
        """Each row's sum, float64 [B]. Logits are made for few tokens at a time, and for no pad."""
        # position t tells token t + 1; a row's last position tells nothing
        tells_BT = batch.attention_mask.roll(-1, dims=1).bool()
        tells_BT[:, -1] = False
        target_N = batch.input_ids.roll(-1, dims=1)[tells_BT].to(state_BTH.device)
        state_NH = state_BTH[tells_BT.to(state_BTH.device)]
        parts = [
            # the fused kernel is five times faster than logsumexp
            cross_entropy(self._model.logits(states[None])[0].float(), targets, reduction="none")
            for states, targets in zip(
                torch.split(state_NH, self._logit_tokens), torch.split(target_N, self._logit_tokens), strict=True
            )
        ]
        nll_BT = torch.zeros(tells_BT.shape, dtype=torch.float64)
        nll_BT[tells_BT] = torch.cat(parts).double().cpu()
        return nll_BT.sum(1)

    # moments

    def restore_moments(self, key: str) -> StoredMoments:
        """Take a calibration set's moments from the store, if it has all of this shard's layers."""
        if key in self._moments:
            return StoredMoments(complete=True)
        found, corrupt = {}, []
        for index in self.span.layers:
            try:
                moments = self._store.load(key, index)
            except CorruptMomentsError as error:
                corrupt.append(str(error))
                continue
            if moments is not None:
                found[index] = {name: seen.to(self._model.device) for name, seen in moments.items()}
        complete = len(found) == len(self.span.layers)
        if complete:
            self._moments[key] = found
        return StoredMoments(complete, tuple(corrupt))

    def forget_moments(self, key: str) -> None:
        """Before a pass over the set: what an earlier, broken pass summed must not be added to."""
        self._gathering.pop(key, None)
        self._moments.pop(key, None)

    def save_moments(self, key: str) -> None:
        """After a pass over the set: its moments are whole, and go to the store."""
        self._moments[key] = self._gathering.pop(key)
        for index, moments in self._moments[key].items():
            self._store.save(key, index, moments)

    # variants

    @torch.inference_mode()
    def mask(self, recipe: Recipe) -> list[LayerMasks]:
        """Make the variant's masks of this shard from the moments it holds; nothing is sent."""
        self.release(recipe.variant.key)
        for index in self.span.layers:
            parts = [(self._moments[key][index], weight) for key, weight in recipe.parts]
            with self._residency.borrow(index) as layer:
                self._make_masks(index, layer, recipe, parts)
        return self.summary(recipe.variant.key)

    @torch.inference_mode()
    def prune_through(
        self,
        recipe: Recipe,
        batches: Sequence[Sequence[Batch]],
        hidden: Sequence[Sequence[Tensor]] | None,
        layers: range,
    ) -> list[list[Tensor]]:
        """Sequential pruning: a layer's moments come from inputs that the pruned layers before it computed.

        `layers` are the next of this shard's. `batches` and `hidden` hold a list a part of the recipe. Returns
        what leaves the last of the pruned layers.
        """
        recorded = [self._record(part) for part in batches]
        states = [self._entering(item, hidden[n] if hidden else None) for n, item in enumerate(recorded)]
        if layers.start == self.span.first:
            self.release(recipe.variant.key)
        for index in layers:
            with self._residency.borrow(index) as layer:
                parts = []
                for n, (_, weight) in enumerate(recipe.parts):
                    with Observer(layer) as observer:
                        self._run(index, layer, recorded[n], states[n], batches[n], observer)
                    parts.append((observer.gathered(), weight))
                masks = self._make_masks(index, layer, recipe, parts)
            if index + 1 == self.span.count:  # nobody reads what leaves the last layer
                return []
            with self._residency.borrow(index, masks) as layer:
                states = [self._run(index, layer, *pair) for pair in zip(recorded, states, strict=True)]
        return states

    def _make_masks(
        self,
        index: int,
        layer: torch.nn.Module,
        recipe: Recipe,
        parts: Sequence[tuple[Mapping[str, Moments], Fraction]],
    ) -> dict[str, PackedMask]:
        variant = recipe.variant
        score, pattern = score_named(variant.score), Pattern.parse(variant.pattern)
        masks, unseen = {}, []
        for name, matrix in matrices(layer).items():
            weight_OI = matrix.view_OI(layer.get_parameter(matrix.parameter).data)
            moments = mixed([(part[name], share) for part, share in parts]) if parts else None
            if moments is not None and not moments.tokens:
                unseen.append(f"{index}.{name}")
            score_OI = score.function(weight_OI, moments, _seed(recipe.seed, index, name))
            if not torch.isfinite(score_OI.amax()):  # NaN is the largest to amax
                where = f"layer {index}, {name}"
                remedy = "the scores are not finite; load the model in float32, or check its weights"
                raise ModelError("model.dtype", where, remedy)
            masks[name] = PackedMask.pack(keep_mask(score_OI, variant.sparsity, pattern))
        self._masks.setdefault(variant.key, {})[index] = masks
        self._summaries.setdefault(variant.key, []).append(_summary(masks, unseen))
        return masks

    def summary(self, variant: str) -> list[LayerMasks]:
        """What the variant's masks came to, a layer each."""
        return self._summaries[variant]

    def release(self, variant: str) -> None:
        """Let go of a variant's masks."""
        self._masks.pop(variant, None)
        self._summaries.pop(variant, None)

    # weights, for export

    @torch.inference_mode()
    def layer_weights(self, index: int, variant: str | None) -> dict[str, Tensor]:
        """A layer's weights on the CPU, masked by `variant`, by their names in the whole model."""
        with self._residency.borrow(index) as layer:
            weights = dict(layer.state_dict())
            if variant:
                weights.update(masked(layer, self._masks[variant][index]))
            prefix = f"{self._model.prefix}.{index}."
            return {prefix + name: data.cpu() for name, data in weights.items()}

    def other_weights(self) -> dict[str, Tensor]:
        """What is not in a layer: embedding on the first shard, norm and head on the last."""
        return {name: data.cpu() for name, data in self._model.other_weights().items()}


def _threads() -> int:
    """All cores that this process may use, whatever the number of shards: BLAS rounds differently with others."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def _sum(before: Mapping[str, Moments] | None, new: Mapping[str, Moments]) -> dict[str, Moments]:
    return {name: before[name] + seen for name, seen in new.items()} if before else dict(new)


def _summary(masks: Mapping[str, PackedMask], unseen: Sequence[str]) -> LayerMasks:
    return LayerMasks(
        dropped=sum(mask.dropped for mask in masks.values()),
        weights=sum(mask.shape[0] * mask.shape[1] for mask in masks.values()),
        digest=hashlib.sha256("".join(mask.digest() for mask in masks.values()).encode()).hexdigest(),
        unseen=tuple(unseen),
    )


def _real_tokens(batch: Batch, device: torch.device) -> Tensor | None:
    """Which of the micro-batch's positions are tokens, [B * T] bool; None when none is a pad."""
    if batch.tokens == batch.input_ids.numel():
        return None
    return batch.attention_mask.reshape(-1).bool().to(device)


def _seed(seed: int, layer: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {layer} {name}".encode()).digest()[:8], "big") >> 1
