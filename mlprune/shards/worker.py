"""One shard's compute as a plain class: moments, masks, hidden states and likelihoods of its own layers.

It knows nothing of Ray; `mlprune.runtime.actors` wraps it in an actor. A pass is layer-major: a layer is borrowed
once, and all micro-batches of the chunk pass it before the next layer is borrowed.
B: rows of a micro-batch. T: its tokens. H: hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlprune.data.batches import Batch
from mlprune.models.hollow import Span
from mlprune.models.matrices import Observer
from mlprune.models.memory import peak_memory
from mlprune.models.replay import Call, ReplayModel, load_layer
from mlprune.models.residency import SINGLE_RANK, Ranks, Residency, Resident, masked, masked_by
from mlprune.models.source import ModelSource
from mlprune.models.structures import Units, cut_out
from mlprune.models.zero import Offload, Zero
from mlprune.planning.machine import usable_cores
from mlprune.planning.memory import LOGIT_TOKENS
from mlprune.pruning.masks import LayerMasks
from mlprune.pruning.moments import Moments
from mlprune.shards.decoding import Session, Step
from mlprune.shards.features import SharedDrops, prompt_norms, shared_drops
from mlprune.shards.gathering import StoredMoments, from_store, over_ranks, real_tokens
from mlprune.shards.kept_masks import KeptMasks
from mlprune.shards.likelihood import row_likelihood
from mlprune.shards.masking import Gathered, MaskRecipe, MaskSummary, masks_of_layer
from mlprune.shards.signals import layer_signal
from mlprune.shards.structured_masks import masks_of_units
from mlprune.storage.moments import MomentStore


@dataclass(frozen=True)
class Setup:
    """What all workers of a pipeline have in common. `offload` None: the weights stay on the device.

    `kept_masks`: bytes of host memory for masks that a later stage may use again.
    """

    source: ModelSource
    dtype: str
    device: str
    store: MomentStore
    offload: Offload | None = None
    kept_masks: int = 0


class ShardWorker:
    """Holds the layers of `span`, their moments and the masks of variants.

    If a shard has several ranks, each gets the same calls and does its share of the batches that it receives: the
    micro-batches `ranks.rank`, `ranks.rank + ranks.size`, ... It returns hidden states and likelihoods of its own.
    """

    def __init__(self, setup: Setup, span: Span, ranks: Ranks = SINGLE_RANK) -> None:
        # the same for any number of shards, because BLAS rounds differently with another number of threads
        torch.set_num_threads(usable_cores())
        self.span, self.ranks = span, ranks
        self._store = setup.store
        setup = replace(setup, source=setup.source.on_this_node())
        dtype, device = setup.source.dtype(setup.dtype), torch.device(setup.device)
        with torch.inference_mode():
            self._model = ReplayModel(setup.source, span, dtype, device, shell=setup.offload is not None)
            self._residency = self._open_residency(setup, dtype)
        self._logit_tokens = min(LOGIT_TOKENS, self._model.positions or LOGIT_TOKENS)
        self.tokens = 0  # that have passed the layers, pads included
        # passes that are running: (pass id, calibration set) -> layer -> moments
        self._gathering: dict[tuple[str, str], dict[int, Mapping[str, Moments]]] = {}
        # complete passes: calibration set -> layer -> moments
        self._moments: dict[str, dict[int, Mapping[str, Moments]]] = {}
        self._features: dict[str, Tensor] = {}  # calibration set -> float64 [rows, H], see take_features
        self._masks: dict[str, dict[int, LayerMasks]] = {}  # variant -> layer
        self._summaries: dict[str, list[MaskSummary]] = {}
        self._kept = KeptMasks(setup.kept_masks)
        self._sessions: dict[str, Session] = {}

    def _open_residency(self, setup: Setup, dtype: torch.dtype) -> Residency:
        if setup.offload is None:
            return Resident(self._model.layers)
        layers = ((index, load_layer(setup.source, self.span, index, dtype)) for index in self.span.layers)
        return Zero(layers, dtype, self._model.device, setup.offload, self.ranks)

    def close(self) -> None:
        """Release the weights, wherever they are."""
        self._residency.close()

    def peak_bytes(self) -> int:
        """Return the most memory that this process has held: on its GPU if it has one, else on the host."""
        if self._model.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._model.device))
        return peak_memory()

    def ready(self) -> None:
        """Do nothing: returns once the layers are loaded and all earlier calls are done."""

    # passes

    @torch.inference_mode()
    def forward(
        self,
        hidden: Sequence[Tensor] | None,
        batches: Sequence[Batch],
        variant: str | None = None,
        gather: Sequence[str] = (),
        pass_id: str = "",
    ) -> list[Tensor]:
        """Pass a chunk through the layers, masked by `variant`.

        `hidden` is what the shard before returned, one [B, T, H] a micro-batch; None on the first shard.
        `gather` names the calibration set of each micro-batch: its moments are added to those of that set in the
        pass `pass_id` (two passes over one set may run at once). Empty: no moments are gathered.

        When it gathers, the last shard returns nothing, because nobody reads the output of the last layer.
        """
        batches = self._share(batches)
        calls, states = self._enter(batches, hidden, skip_last_token=not gather)
        keys = gather[self.ranks.rank :: self.ranks.size]
        sets = {key: [n for n, own in enumerate(keys) if own == key] for key in dict.fromkeys(gather)}
        if self.span.is_first:
            for number, key in enumerate(keys):
                self._add_features(key, 0, batches[number], states[number])
        for index in self.span.layers:
            masks = self._masks[variant][index] if variant else None
            with self._residency.borrow(index, self._next(index)) as layer, masked_by(layer, masks):
                if not gather:
                    self._model.advance(index, layer, calls, states)
                for key, members in sets.items():
                    by_layer = self._gathering.setdefault((pass_id, key), {})
                    with Observer(layer, by_layer.get(index)) as observer:
                        for number in members:
                            observer.keep = real_tokens(batches[number], self._model.device)
                            states[number] = self._model.run(layer, states[number], calls[number][index])
                            self._add_features(key, index + 1, batches[number], states[number])
                    by_layer[index] = observer.gathered()
        return [] if gather and self.span.is_last else states

    @torch.inference_mode()
    def likelihood(
        self,
        hidden: Sequence[Tensor] | None,
        batches: Sequence[Batch],
        variant: str | None = None,
        greedy: bool = False,
    ) -> list[Tensor]:
        """Return each row's negative log-likelihood of its scored tokens, in nats: float64 [B] a micro-batch.

        Called on the last shard. `greedy`: [B, 2]; the second column is 1 where every scored token is the
        likeliest one at its position, else 0.
        """
        states, share = self.forward(hidden, batches, variant), self._share(batches)
        return [
            row_likelihood(self._model, batch, state, self._logit_tokens, greedy)
            for batch, state in zip(share, states, strict=True)
        ]

    def _share(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches[self.ranks.rank :: self.ranks.size]

    def _next(self, index: int) -> int | None:
        """Return the shard's layer after this one, which may be prefetched."""
        return index + 1 if index + 1 in self.span.layers else None

    def _enter(
        self, batches: Sequence[Batch], hidden: Sequence[Tensor] | None, skip_last_token: bool = False
    ) -> tuple[list[Mapping[int, Call]], list[Tensor]]:
        """Return for each micro-batch the layers' other arguments, and the hidden states that enter.

        `skip_last_token`: for likelihoods, the last token is only a target and not an input, so that a row may be
        one token longer than the model's positions.
        """
        end = -1 if skip_last_token else None
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
        self, hidden: Sequence[Tensor] | None, session: str, steps: Sequence[Step], variant: str | None = None
    ) -> list[Tensor]:
        """Pass the next input of each group through the layers, masked by `variant`; see `Session.decode`."""
        self.tokens += sum(step.input_ids.numel() for step in steps)
        return self._session(session, variant).decode(steps, hidden)

    @torch.inference_mode()
    def next_tokens(
        self, hidden: Sequence[Tensor] | None, session: str, steps: Sequence[Step], variant: str | None = None
    ) -> dict[int, list[int]]:
        """Return for each group the likeliest next token of each of its rows. Called on the last shard."""
        self.tokens += sum(step.input_ids.numel() for step in steps)
        return self._session(session, variant).next_tokens(steps, hidden)

    def _session(self, session: str, variant: str | None) -> Session:
        if session not in self._sessions:
            masks = self._masks[variant] if variant else None
            self._sessions[session] = Session(self._model, self._residency, self.ranks, masks)
        return self._sessions[session]

    @torch.inference_mode()
    def close_session(self, session: str) -> None:
        """Release all that the session keeps, if this shard has it."""
        if session in self._sessions:
            self._sessions.pop(session).close()

    # moments

    def restore_moments(self, key: str) -> StoredMoments:
        """Load a calibration set's moments from the store, if it has those of all layers of this shard."""
        if key in self._moments:
            return StoredMoments(complete=True)
        moments, stored = from_store(self._store, key, self.span.layers, self._model.device)
        if stored.complete:
            self._moments[key] = moments
        return stored

    def save_moments(self, key: str, pass_id: str) -> None:
        """Keep a set's moments after a complete pass over it, and write them to the store."""
        gathered = self._gathering.pop((pass_id, key))
        self._moments[key] = {
            index: over_ranks(self._residency, self.ranks, moments) for index, moments in gathered.items()
        }
        if not self.ranks.is_first:
            return
        for index, moments in self._moments[key].items():
            self._store.save(key, index, moments)

    def discard_pass(self, pass_id: str) -> None:
        """Discard the sums of a pass that failed."""
        self._gathering = {key: sums for key, sums in self._gathering.items() if key[0] != pass_id}

    # variants

    @torch.inference_mode()
    def mask(self, recipe: MaskRecipe) -> list[MaskSummary]:
        """Make the variant's masks of this shard from the moments it holds. No data is exchanged."""
        self.release(recipe.variant.key)
        for index in self.span.layers:
            with self._residency.borrow(index, self._next(index)) as layer:
                self._make_masks(index, layer, recipe, self._gathered(recipe, index))
        return self.summary(recipe.variant.key)

    @torch.inference_mode()
    def signals(self, recipe: MaskRecipe) -> list[float]:
        """Return the signal of each layer of this shard for the recipe's allocation."""
        signals = []
        for index in self.span.layers:
            with self._residency.borrow(index, self._next(index)) as layer:
                gathered, dense = self._gathered(recipe, index), self._dense(recipe, index)
                signals.append(layer_signal(layer, recipe, gathered, dense))
        return signals

    def _gathered(self, recipe: MaskRecipe, index: int) -> Gathered:
        return {key: self._moments[key][index] for key in recipe.keys}

    def _dense(self, recipe: MaskRecipe, index: int) -> Gathered:
        return {key: self._moments[key][index] for _, key in recipe.forecasts}

    @torch.inference_mode()
    def prune_through(
        self,
        hidden: Sequence[Sequence[Tensor]] | None,
        recipe: MaskRecipe,
        batches: Sequence[Sequence[Batch]],
        layers: range,
    ) -> list[list[Tensor]]:
        """Prune sequentially: a layer's moments come from inputs computed by the pruned layers before it.

        `layers` are this shard's next ones. `batches` and `hidden` hold one list for each calibration set of the
        recipe (`recipe.keys`). Returns the output of the last of the pruned layers.
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
                        for batch, by_layer, state in zip(part, calls, states, strict=True):
                            observer.keep = real_tokens(batch, self._model.device)
                            self._model.run(layer, state, by_layer[index])
                    gathered[key] = over_ranks(self._residency, self.ranks, observer.gathered())
                masks = self._make_masks(index, layer, recipe, gathered)
                if index + 1 == self.span.count:  # nobody reads the output of the last layer
                    return []
                with masked_by(layer, masks):
                    for calls, states in entered:
                        self._model.advance(index, layer, calls, states)
        return [states for _, states in entered]

    def _make_masks(
        self, index: int, layer: torch.nn.Module, recipe: MaskRecipe, gathered: Gathered
    ) -> LayerMasks:
        dense = self._dense(recipe, index)
        if recipe.removal is None:
            masks, summary = masks_of_layer(index, layer, recipe, gathered, dense)
        else:
            masks, summary = masks_of_units(index, layer, recipe, recipe.removal, gathered, dense)
        self._masks.setdefault(recipe.variant.key, {})[index] = masks
        self._summaries.setdefault(recipe.variant.key, []).append(summary)
        return masks

    def summary(self, variant: str) -> list[MaskSummary]:
        """Return the summary of the variant's masks, one a layer."""
        return self._summaries[variant]

    def release(self, variant: str, keep: bool = False) -> None:
        """Release a variant's masks. With `keep` they stay in host memory for `reuse`, as far as there is room."""
        masks, summaries = self._masks.pop(variant, {}), self._summaries.pop(variant, [])
        if keep and len(masks) == len(self.span.layers):
            self._kept.put(variant, masks, summaries)

    def reuse(self, variant: str) -> list[MaskSummary] | None:
        """Take a variant's kept masks into use again; return their summary, or None if they are not kept."""
        kept = self._kept.take(variant, self._model.device)
        if kept is None:
            return None
        self._masks[variant], self._summaries[variant] = kept
        return self._summaries[variant]

    def discard_variant(self, variant: str) -> None:
        """Release a variant's masks and close its generation sessions."""
        self.release(variant)
        for session in [name for name in self._sessions if name.startswith(f"{variant} ")]:
            self.close_session(session)

    def reset_trials(self) -> None:
        """Discard everything but weights and complete moments. No trial may be running."""
        self._gathering.clear()
        self._masks.clear()
        self._kept.clear()
        self._summaries.clear()
        for session in list(self._sessions):
            self.close_session(session)

    # for analysis

    def start_features(self, keys: Sequence[str], width: int) -> None:
        """Measure the hidden states in the next pass that gathers these sets; `width` is H."""
        rows = len(self.span.layers) + self.span.is_first
        zeros_LH = torch.zeros(rows, width, dtype=torch.float64, device=self._model.device)
        self._features = {key: zeros_LH.clone() for key in keys}

    def _add_features(self, key: str, depth: int, batch: Batch, state_BTH: Tensor) -> None:
        """Add hidden states after `depth` layers of the model."""
        if key in self._features:
            row = depth - self.span.first - (not self.span.is_first)
            self._features[key][row] += prompt_norms(state_BTH, batch.attention_mask)

    def take_features(self) -> dict[str, Tensor]:
        """Return after the pass, for each set, each channel's norm summed over the prompts.

        float64 [rows, H]: a row for the output of each layer of this shard; before them, in the first shard, one
        for what enters the first layer.
        """
        taken, self._features = self._features, {}
        return {key: self._residency.sum_over_ranks(sum_LH).cpu() for key, sum_LH in taken.items()}

    @torch.inference_mode()
    def shared_drops(self, recipes: Sequence[MaskRecipe]) -> list[SharedDrops]:
        """Return for each layer how much of their masks the variants share. No mask is kept."""
        by_layer = []
        for index in self.span.layers:
            gathered = {key: self._moments[key][index] for recipe in recipes for key in recipe.keys}
            with self._residency.borrow(index, self._next(index)) as layer:
                by_layer.append(shared_drops(index, layer, recipes, gathered))
        return by_layer

    # weights, for export

    @torch.inference_mode()
    def layer_weights(self, index: int, variant: str | None, cut: Units | None = None) -> dict[str, Tensor]:
        """Return a layer's weights on the CPU, masked by `variant`, by name in the model.

        `cut`: without those of these units that the variant removes. Ranks other than the first return nothing.
        """
        with self._residency.borrow(index, self._next(index)) as layer:
            if not self.ranks.is_first:
                return {}
            weights = dict(layer.state_dict())
            if variant:
                masks = self._masks[variant][index]
                weights.update(masked(layer, masks))
                if cut is not None and cut.behind in masks:
                    keep_U = masks[cut.behind].columns[:: cut.columns]
                    weights = cut_out(layer, weights, cut, keep_U)
            prefix = f"{self._model.prefix}.{index}."
            return {prefix + name: data.cpu().clone() for name, data in weights.items()}

    def other_weights(self) -> dict[str, Tensor]:
        """Return the weights outside the layers: the embedding on the first shard, norm and head on the last.

        Ranks other than the first return nothing.
        """
        if not self.ranks.is_first:
            return {}
        return {name: data.cpu() for name, data in self._model.other_weights().items()}
