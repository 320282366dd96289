"""Searches the weights of mixtures, by forecasts or by measured losses. What is searched is in `mixtures`.

All searches of one kind run together, batch by batch. As in `searching`, the choices follow from the seed and from
results alone, so that an interrupted search makes the same ones again.

P: parts of a mixture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mlprune.evaluation.loss import LOSS, loss_metrics
from mlprune.spec.calibrations import Calibration
from mlprune.spec.mixtures import MinimaxMixture, OptunaMixture
from mlprune.spec.variants import Variant
from mlprune.storage.results import Result
from mlprune.sweep.mixtures import MixtureSearch, evaluated_trials, forecast_trials
from mlprune.sweep.plan import SweepPlan
from mlprune.sweep.screening import FORECAST
from mlprune.sweep.searching import Point, Suggestions
from mlprune.sweep.stage import MASKS_ONLY, Purpose, Stage
from mlprune.sweep.stage_runner import StageRunner

NAME = "searching mixtures"
# mixtures that are forecast at a time; fixed as in `searching`, and larger, because forecasts are cheap
BATCH = 10
CORNER = 1e-6  # of the unit interval, where a weight is 1 and all others round to 0

Results = Mapping[Variant, Result]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FoundMixtures:
    """What the searches yield."""

    trials: tuple[Variant, ...] = ()  # to be ranked; those of minimax are evaluated already
    forecast: Results = field(default_factory=dict)  # all trials whose masks were made for a forecast


def search_mixtures(plan: SweepPlan, runner: StageRunner, dense: Result) -> FoundMixtures:
    """Run all searches for mixtures of the sweep."""
    seed = plan.prepared.spec.calibration.seed
    by_forecast = [_ForecastSearch(one, seed) for one in plan.searches if isinstance(one.section, OptunaMixture)]
    by_loss = [
        _LossSearch(one, dense, plan.prepared.spec.evaluation.perplexity.languages)
        for one in plan.searches
        if isinstance(one.section, MinimaxMixture)
    ]
    expected = len(forecast_trials(plan.searches))
    forecast = _run_all(by_forecast, runner, Stage(Purpose.SCREEN, NAME, MASKS_ONLY, trials=expected))
    expected = len(evaluated_trials(one.search for one in by_loss))
    evaluated = _run_all(by_loss, runner, Stage(Purpose.SELECT, NAME, plan.prepared.suite, trials=expected))
    promising = [trial for one in by_forecast for trial in one.promising()]
    return FoundMixtures(tuple(dict.fromkeys([*promising, *evaluated])), forecast)


def _run_all(
    searches: Sequence[_ForecastSearch] | Sequence[_LossSearch], runner: StageRunner, stage: Stage
) -> dict[Variant, Result]:
    """Run the next batch of all searches in one go, until they end; return all results."""
    results: dict[Variant, Result] = {}
    while batch := [trial for one in searches for trial in one.ask()]:
        results |= runner.run(stage, list(dict.fromkeys(batch)))
        for one in searches:
            one.tell(results)
    return results


class _ForecastSearch:
    """Optuna chooses weights by the forecast of their masks.

    A point has a number u in [0, 1] for each part, whose weight is proportional to -log u: uniform numbers lead to
    weights that are uniform on the simplex. The first points are equal weights, and each part alone.
    """

    def __init__(self, search: MixtureSearch, seed: int) -> None:
        assert isinstance(search.section, OptunaMixture)
        self.search, self._section = search, search.section
        self._names = [str(part) for part in search.section.parts]
        corners = [dict.fromkeys(self._names, 1 - CORNER) | {alone: CORNER} for alone in self._names]
        self._suggestions = Suggestions(
            dict.fromkeys(self._names),
            self._calibration,
            self._random_points(seed),
            seed,
            first=[dict.fromkeys(self._names, 0.5), *corners],
        )
        self._asked: list[Calibration] = []
        self._known: dict[Calibration, float] = {}

    def _calibration(self, point: Point) -> Calibration:
        inner = [min(max(point[name], CORNER), 1 - CORNER) for name in self._names]
        return self.search.section.calibration([-math.log(number) for number in inner])

    def _random_points(self, seed: int) -> Iterator[Point]:
        draw = np.random.default_rng(seed)
        for _ in range(100 * self._section.trials):  # two parts have a thousand different weights only
            yield dict(zip(self._names, draw.random(len(self._names)).tolist(), strict=True))

    def ask(self) -> list[Variant]:
        """Return the trials of the next batch; none if the search has ended."""
        left = self._section.trials - len(self._known)
        self._asked = self._suggestions.ask(min(BATCH, left))
        return [trial for calibration in self._asked for trial in self.search.trials(calibration)]

    def tell(self, results: Results) -> None:
        """Read the forecasts of the batch: means over its finished seeds."""
        metric = f"{FORECAST}{self._section.objective}"
        values = {}
        for calibration in self._asked:
            finished = [results[trial] for trial in self.search.trials(calibration) if trial in results]
            if finished:
                values[calibration] = fmean(result.metrics[metric] for result in finished)
        self._suggestions.tell(values)
        self._known |= {calibration: values.get(calibration, math.nan) for calibration in self._asked}

    def promising(self) -> list[Variant]:
        """Return the trials of the mixtures with the lowest forecasts."""
        ordered = sorted(self._known, key=lambda one: (math.isnan(self._known[one]), self._known[one]))
        return [trial for one in ordered[: self._section.evaluate] for trial in self.search.trials(one)]


class _LossSearch:
    """Each round evaluates a mixture, and moves its weights towards the languages that lose most."""

    def __init__(self, search: MixtureSearch, dense: Result, languages: Sequence[str]) -> None:
        assert isinstance(search.section, MinimaxMixture)
        self.search, self._section, self._dense = search, search.section, dense
        self._languages = search.section.languages(languages)
        self._log_weights_P = np.zeros(len(self._section.parts))
        self._round, self._ended = 0, False

    def _trials(self) -> list[Variant]:
        weights_P = np.exp(self._log_weights_P - self._log_weights_P.max())
        return self.search.trials(self._section.calibration(weights_P.tolist()))

    def ask(self) -> list[Variant]:
        """Return the trials of the next round; none if the search has ended."""
        self._ended |= self._round == self._section.rounds
        return [] if self._ended else self._trials()

    def tell(self, results: Results) -> None:
        """Read the losses of the round: means over its finished seeds. Without finite losses the search ends."""
        if self._ended:
            return
        finished = [results[trial] for trial in self._trials() if trial in results]
        losses = [loss_metrics(result.metrics, self._dense.metrics) for result in finished]
        loss_P = np.array([fmean(one[LOSS + code] for one in losses) for code in self._languages if losses])
        self._ended = not losses or not bool(np.isfinite(loss_P).all())
        if self._ended:
            logger.warning("the search from %s ends after %d rounds", self.search.equal.label, self._round)
            return
        self._log_weights_P = minimax_step(self._log_weights_P, loss_P, self._section.eta)
        self._round += 1


def minimax_step(
    log_weights_P: NDArray[np.float64], loss_P: NDArray[np.float64], eta: float
) -> NDArray[np.float64]:
    """Return the logarithms of the weights, each times exp(eta * (its loss - mean loss)), up to a common factor.

    These are multiplicative weights (Freund and Schapire 1999): the weights play against the masks, and a language
    gains weight while it loses more than the others. Group DRO (Sagawa et al. 2020) weights training losses so.
    """
    moved_P: NDArray[np.float64] = log_weights_P + eta * (loss_P - loss_P.mean())
    return moved_P
