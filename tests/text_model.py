"""A pipeline without a model: the likelihood of a line depends on the line and on the variant alone."""

import random
from collections.abc import Callable

from mlprune.data.batches import RowSet
from mlprune.evaluation.perplexity import Perplexity
from mlprune.shards.masking import MaskRecipe
from mlprune.shards.pipeline import MaskOutcome
from mlprune.spec.variants import Variant
from mlprune.sweep.prepare import Prepared

Harm = Callable[[Variant, str], float]  # how much more bits a variant needs in a language; "" is of other tasks


class TextModel:
    """Stands for a pipeline. Nats of a row: random by its tokens, times 1 + the harm of the variant.

    A forecast is a tenth of the harm.
    """

    def __init__(self, prepared: Prepared, harm: Harm, noise: float = 0.05) -> None:
        self._harm, self._noise = harm, noise
        self._variants: dict[str, Variant] = {}
        self._languages = _languages(prepared)

    def restore(self, key: str) -> tuple[bool, list[str]]:
        return True, []

    def prune(self, recipe: MaskRecipe) -> MaskOutcome:
        self._variants[recipe.variant.key] = recipe.variant
        forecast = {code: self._harm(recipe.variant, code) / 10 for code, _ in recipe.forecasts}
        return MaskOutcome(1, 2, f"masks of {recipe.variant.key}", (), (0.5,), forecast)

    def release(self, key: str, keep: bool = False) -> None:
        pass

    def likelihood(self, rows: RowSet, variant: str | None = None, progress: object = None) -> list[float]:
        nats = [0.0] * rows.count
        for batch in rows.batches:
            for place, row in enumerate(batch.rows):
                ids = batch.input_ids[place, : batch.lengths[place]].tolist()
                nats[row] = random.Random(str(ids)).uniform(1, 5) * len(ids)
                if variant is not None:
                    harm = self._harm(self._variants[variant], self._languages.get(str(ids), ""))
                    nats[row] *= 1 + harm + random.Random(f"{variant} {ids}").gauss(0, self._noise)
        return nats


def _languages(prepared: Prepared) -> dict[str, str]:
    """Return the language of each held-out line, by its tokens."""
    assert prepared.evaluation is not None
    suites = [suite for suite in (prepared.evaluation.selection, prepared.evaluation.confirmation) if suite]
    tasks = [task for suite in suites for task in suite.likelihood_tasks if isinstance(task, Perplexity)]
    return {
        str(batch.input_ids[place, : batch.lengths[place]].tolist()): task.lines[row].language
        for task in tasks
        for batch in task.rows.batches
        for place, row in enumerate(batch.rows)
    }
