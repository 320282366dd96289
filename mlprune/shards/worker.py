"""One shard's work, as a plain class: moments, masks, hidden states and likelihoods of its own layers.

A pass is layer-major: a layer is borrowed once, and sees all its micro-batches before the next is touched.
B: rows of a micro-batch. T: its tokens. H: hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlprune.data.calibration import Batch
from mlprune.models.hollow import Span
from mlprune.models.matrices import Observer
from mlprune.models.memory import peak_memory
from mlprune.models.replay import Call, ReplayModel, load_layer
from mlprune.models.residency import SINGLE_RANK, Ranks, Residency, Resident, masked, masked_by
from mlprune.models.source import ModelSource
from mlprune.models.zero import Offload, Zero
from mlprune.planning.machine import own_cores
from mlprune.planning.memory import LOGIT_TOKENS
from mlprune.pruning.masks import LayerMasks
from mlprune.pruning.moments import Moments
from mlprune.shards.decoding import Session, Step
from mlprune.shards.features import SharedDrops, prompt_norms, shared_drops
from mlprune.shards.gathering import StoredMoments, from_store, over_ranks, real_tokens
from mlprune.shards.likelihood import row_likelihood
from mlprune.shards.masking import Gathered, MaskSummary, Recipe, masks_of_layer, outliers_of_layer
from mlprune.storage.moments import MomentStore


@dataclass(frozen=True)
class Setup:
    """What all workers of a pipeline have in common. `offload` None: the weights stay on the device."""

    source: ModelSource
    dtype: str
    device: str
    store: MomentStore
    offload: Offload | None = None


class ShardWorker:
    """Holds the layers of `span` and what was gathered on them.

    With several ranks, each of them is told the same and does its share: the micro-batches `ranks.rank`,
    `ranks.rank + ranks.size`, ... of what it is given. Hidden states and likelihoods are those of the share.
    """

    def __init__(self, setup: Setup, span: Span, ranks: Ranks = SINGLE_RANK) -> None:
        torch.set_num_threads(own_cores())  # whatever the number of shards: BLAS rounds differently with others
        self.span, self.ranks = span, ranks
        self._store = setup.store
        setup = replace(setup, source=setup.source.on_this_node())
        dtype, device = setup.source.dtype(setup.dtype), torch.device(setup.device)
        with torch.inference_mode():
            self._model = ReplayModel(setup.source, span, dtype, device, shell=setup.offload is not None)
            self._residency = self._reside(setup, dtype)
        self._logit_tokens = min(LOGIT_TOKENS, self._model.positions or LOGIT_TOKENS)
        self.tokens = 0  # that have passed the layers, pads included
        # passes that are under way: (pass, set) -> layer -> moments
        self._gathering: dict[tuple[str, str], dict[int, Mapping[str, Moments]]] = {}
        self._moments: dict[str, dict[int, Mapping[str, Moments]]] = {}  # of whole passes
        self._features: dict[str, Tensor] = {}  # calibration set -> float64 [layers of the shard, H]
        self._masks: dict[str, dict[int, LayerMasks]] = {}
        self._summaries: dict[str, list[MaskSummary]] = {}
        self._sessions: dict[str, Session] = {}

    def _reside(self, setup: Setup, dtype: torch.dtype) -> Residency:
        if setup.offload is None:
            return Resident(self._model.layers)
        layers = ((index, load_layer(setup.source, self.span, index, dtype)) for index in self.span.layers)
        return Zero(layers, dtype, self._model.device, setup.offload, self.ranks)

    def close(self) -> None:
        """Let go of the weights, wherever they are."""
        self._residency.close()

    def peak_bytes(self) -> int:
        """The most memory that this process has held: of its GPU if it has one, else of the machine."""
        if self._model.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._model.device))
        return peak_memory()

    def ready(self) -> None:
        """Answers once the layers are loaded, and what was asked before is done."""

    # passes

    @torch.inference_mode()
    def forward(
        self,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor] | None,
        variant: str | None = None,
        gather: Sequence[str] | None = None,
        passing: str = "",
    ) -> list[Tensor]:
        """Pass a chunk through the layers, masked by `variant`.

        `gather` names the calibration set of each micro-batch: its moments are added to that set's, of the pass
        that `passing` names (two passes over a set may be under way at once).

        `hidden` is what the shard before returned, one [B, T, H] a micro-batch; None on the first shard.
        The last shard returns nothing when it gathers: nobody reads what leaves the last layer then.
        """
        batches = self._share(batches)
        calls, states = self._enter(batches, hidden, told=not gather)
        keys = gather[self.ranks.rank :: self.ranks.size] if gather else ()
        sets = {key: [n for n, own in enumerate(keys) if own == key] for key in dict.fromkeys(gather or ())}
        for index in self.span.layers:
            masks = self._masks[variant][index] if variant else None
            with self._residency.borrow(index, self._next(index)) as layer, masked_by(layer, masks):
                if not gather:
                    self._model.advance(index, layer, calls, states)
                for key, members in sets.items():
                    of_set = self._gathering.setdefault((passing, key), {})
                    with Observer(layer, of_set.get(index)) as observer:
                        for number in members:
                            observer.keep = real_tokens(batches[number], self._model.device)
                            states[number] = self._model.run(layer, states[number], calls[number][index])
                            self._add_features(key, index, batches[number], states[number])
                    of_set[index] = observer.gathered()
        return [] if gather and self.span.is_last else states

    @torch.inference_mode()
    def likelihood(
        self,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor] | None,
        variant: str | None = None,
        greedy: bool = False,
    ) -> list[Tensor]:
        """On the last shard, of each row's scored tokens: their negative log-likelihood in nats, float64 [B].

        `greedy`: [B, 2]; beside it, 1 where each of them is the likeliest at its place, else 0.
        """
        states, share = self.forward(batches, hidden, variant), self._share(batches)
        return [
            row_likelihood(self._model, batch, state, self._logit_tokens, greedy)
            for batch, state in zip(share, states, strict=True)
        ]

    def _share(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches[self.ranks.rank :: self.ranks.size]

    def _next(self, index: int) -> int | None:
        """The shard's layer after this one, to be sent for."""
        return index + 1 if index + 1 in self.span.layers else None

    def _enter(
        self, batches: Sequence[Batch], hidden: Sequence[Tensor] | None, told: bool = False
    ) -> tuple[list[Mapping[int, Call]], list[Tensor]]:
        """For each micro-batch what the layers are given beside hidden states, and the states that enter.

        `told`: likelihoods are asked. Then the last token is told and not given, so that a row may be one longer
        than the model's positions.
        """
        end = -1 if told else None
        calls, states = [], []
        self.tokens += sum(batch.input_ids.numel() for batch in batches)
        for number, batch in enumerate(batches):
            recorded = self._model.record(batch.input_ids[:, :end], batch.attention_mask[:, :end])
            calls.append(recorded.calls)
            states.append(recorded.embedded_BTH if hidden is None else hidden[number].to(self._model.device))
        return calls, states

    # generation

    @torch.inference_mode()
    def decode(
        self, session: str, steps: Sequence[Step], hidden: Sequence[Tensor] | None, variant: str | None = None
    ) -> list[Tensor]:
        """Pass what each group is given next through the layers, masked by `variant`; see `Session.decode`."""
        self.tokens += sum(step.input_ids.numel() for step in steps)
        return self._session(session, variant).decode(steps, hidden)

    @torch.inference_mode()
    def next_tokens(
        self, session: str, steps: Sequence[Step], hidden: Sequence[Tensor] | None, variant: str | None = None
    ) -> dict[int, list[int]]:
        """On the last shard: group -> the likeliest next token of each of its rows."""
        self.tokens += sum(step.input_ids.numel() for step in steps)
        return self._session(session, variant).next_tokens(steps, hidden)

    def _session(self, session: str, variant: str | None) -> Session:
        if session not in self._sessions:
            masks = self._masks[variant] if variant else None
            self._sessions[session] = Session(self._model, self._residency, self.ranks, masks)
        return self._sessions[session]

    @torch.inference_mode()
    def end_session(self, session: str) -> None:
        """Let go of all that the session keeps, if this shard came to know of it."""
        if session in self._sessions:
            self._sessions.pop(session).close()

    # moments

    def restore_moments(self, key: str) -> StoredMoments:
        """Take a calibration set's moments from the store, if it has all of this shard's layers."""
        if key in self._moments:
            return StoredMoments(complete=True)
        found, stored = from_store(self._store, key, self.span.layers, self._model.device)
        if stored.complete:
            self._moments[key] = found
        return stored

    def save_moments(self, key: str, passing: str) -> None:
        """After a pass over the set: its moments are whole, and go to the store."""
        gathered = self._gathering.pop((passing, key))
        self._moments[key] = {
            index: over_ranks(self._residency, self.ranks, moments) for index, moments in gathered.items()
        }
        if not self.ranks.is_first:
            return
        for index, moments in self._moments[key].items():
            self._store.save(key, index, moments)

    def end_pass(self, passing: str) -> None:
        """Let go of what a pass that broke off had summed."""
        self._gathering = {key: sums for key, sums in self._gathering.items() if key[0] != passing}

    # variants

    @torch.inference_mode()
    def mask(self, recipe: Recipe) -> list[MaskSummary]:
        """Make the variant's masks of this shard from the moments it holds; nothing is sent."""
        self.release(recipe.variant.key)
        for index in self.span.layers:
            with self._residency.borrow(index, self._next(index)) as layer:
                self._make_masks(index, layer, recipe, self._gathered(recipe, index))
        return self.summary(recipe.variant.key)

    @torch.inference_mode()
    def outliers(self, recipe: Recipe) -> list[float]:
        """The share of outliers in each layer of this shard, from the moments that it holds."""
        shares = []
        for index in self.span.layers:
            with self._residency.borrow(index, self._next(index)) as layer:
                shares.append(outliers_of_layer(layer, recipe, self._gathered(recipe, index)))
        return shares

    def _gathered(self, recipe: Recipe, index: int) -> Gathered:
        return {key: self._moments[key][index] for key in recipe.keys}

    @torch.inference_mode()
    def prune_through(
        self,
        recipe: Recipe,
        batches: Sequence[Sequence[Batch]],
        hidden: Sequence[Sequence[Tensor]] | None,
        layers: range,
    ) -> list[list[Tensor]]:
        """Sequential pruning: a layer's moments come from inputs that the pruned layers before it computed.

        `layers` are the next of this shard's. `batches` and `hidden` hold a list a calibration set of the recipe
        (`recipe.keys`). Returns what leaves the last of the pruned layers.
        """
        batches = [self._share(part) for part in batches]
        entered = [self._enter(part, hidden[n] if hidden else None) for n, part in enumerate(batches)]
        if layers.start == self.span.first:
            self.release(recipe.variant.key)
        for index in layers:
            then = index + 1 if index + 1 in layers else None
            with self._residency.borrow(index, then) as layer:
                gathered = {}
                for key, part, (calls, states) in zip(recipe.keys, batches, entered, strict=True):
                    with Observer(layer, gram=recipe.gram) as observer:
                        for batch, given, state in zip(part, calls, states, strict=True):
                            observer.keep = real_tokens(batch, self._model.device)
                            self._model.run(layer, state, given[index])
                    gathered[key] = over_ranks(self._residency, self.ranks, observer.gathered())
                masks = self._make_masks(index, layer, recipe, gathered)
                if index + 1 == self.span.count:  # nobody reads what leaves the last layer
                    return []
                with masked_by(layer, masks):
                    for calls, states in entered:
                        self._model.advance(index, layer, calls, states)
        return [states for _, states in entered]

    def _make_masks(self, index: int, layer: torch.nn.Module, recipe: Recipe, gathered: Gathered) -> LayerMasks:
        masks, summary = masks_of_layer(index, layer, recipe, gathered)
        self._masks.setdefault(recipe.variant.key, {})[index] = masks
        self._summaries.setdefault(recipe.variant.key, []).append(summary)
        return masks

    def summary(self, variant: str) -> list[MaskSummary]:
        """What the variant's masks came to, a layer each."""
        return self._summaries[variant]

    def release(self, variant: str) -> None:
        """Let go of a variant's masks."""
        self._masks.pop(variant, None)
        self._summaries.pop(variant, None)

    def abandon(self, variant: str) -> None:
        """Let go of a variant's masks, and of what was being written with them."""
        self.release(variant)
        for session in [name for name in self._sessions if name.startswith(f"{variant} ")]:
            self.end_session(session)

    def forget_trials(self) -> None:
        """Let go of everything but weights and whole moments: all trials have broken off."""
        self._gathering.clear()
        self._masks.clear()
        self._summaries.clear()
        for session in list(self._sessions):
            self.end_session(session)

    # for analysis

    def start_features(self, keys: Sequence[str], width: int) -> None:
        """Have what leaves each layer measured, in the coming pass that gathers these sets; `width` is H."""
        zeros_LH = torch.zeros(len(self.span.layers), width, dtype=torch.float64, device=self._model.device)
        self._features = {key: zeros_LH.clone() for key in keys}

    def _add_features(self, key: str, index: int, batch: Batch, state_BTH: Tensor) -> None:
        if key in self._features:
            self._features[key][index - self.span.first] += prompt_norms(state_BTH, batch.attention_mask)

    def take_features(self) -> dict[str, Tensor]:
        """After the pass: for each set each channel's norm summed over the prompts, float64 [own layers, H]."""
        taken, self._features = self._features, {}
        return {key: self._residency.sum_over_ranks(sum_LH).cpu() for key, sum_LH in taken.items()}

    @torch.inference_mode()
    def shared_drops(self, recipes: Sequence[Recipe]) -> list[SharedDrops]:
        """How much of their masks the variants share, a layer each; no mask is kept."""
        found = []
        for index in self.span.layers:
            gathered = {key: self._moments[key][index] for recipe in recipes for key in recipe.keys}
            with self._residency.borrow(index, self._next(index)) as layer:
                found.append(shared_drops(index, layer, recipes, gathered))
        return found

    # weights, for export

    @torch.inference_mode()
    def layer_weights(self, index: int, variant: str | None) -> dict[str, Tensor]:
        """A layer's weights on the CPU, masked by `variant`, by their names in the model; of the first rank."""
        with self._residency.borrow(index, self._next(index)) as layer:
            if not self.ranks.is_first:
                return {}
            weights = dict(layer.state_dict())
            if variant:
                weights.update(masked(layer, self._masks[variant][index]))
            prefix = f"{self._model.prefix}.{index}."
            return {prefix + name: data.cpu().clone() for name, data in weights.items()}

    def other_weights(self) -> dict[str, Tensor]:
        """What is not in a layer: embedding on the first shard, norm and head on the last; of the first rank."""
        if not self.ranks.is_first:
            return {}
        return {name: data.cpu() for name, data in self._model.other_weights().items()}
