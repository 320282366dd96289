"""Forms of a forecast of damage, and how well each of them orders trials by the measured loss.

A form reduces what is known of the matrices of a trial, on the text of one language, to one number. The trials are
made in forecast.py, which describes the measures. N: trials. M: matrices.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from mlprune.spec.variants import VariantValues

Values = NDArray[np.float64]
PAIRS = {"text": "calibration", "allocation": "allocation", "pattern": "pattern", "propagation": "propagation"}


@dataclass(frozen=True)
class Trial:
    """One trial: its measured losses by language, and its measures: measure -> language -> a value per matrix."""

    seed: int
    variant: VariantValues
    matrices: Sequence[str]
    loss: Mapping[str, float]
    measures: Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class View:
    """Some trials' measures in one language."""

    trials: Sequence[Trial]
    language: str

    def __getitem__(self, measure: str) -> Values:
        """Return a measure of each matrix, [N, M]."""
        return np.array([trial.measures[measure][self.language] for trial in self.trials])

    @property
    def depth_M(self) -> Values:
        """Return the number of each matrix's layer, from 1."""
        numbers = [re.search(r"\.(\d+)\.", name) for name in self.trials[0].matrices]
        return np.array([1 + int(number[1]) for number in numbers if number], dtype=float)

    @property
    def writes_M(self) -> NDArray[np.bool_]:
        """Return which matrices write to the residual stream, by their names in Llama."""
        return np.array([bool(re.search(r"(o|down)_proj", name)) for name in self.trials[0].matrices])


def _weighted(values_NM: Values, weight_M: Values) -> Values:
    result: Values = (values_NM * weight_M).sum(-1) / (weight_M + 0 * values_NM).sum(-1)
    return result


FORMS: dict[str, Callable[[View], Values]] = {
    "plain": lambda view: view["share"].mean(1),
    "by energy": lambda view: _weighted(view["share"], view["energy"]),
    "early layers": lambda view: _weighted(view["share"], 1 + view.depth_M.max() - view.depth_M),
    "late layers": lambda view: _weighted(view["share"], view.depth_M),
    "residual writers": lambda view: view["share"][:, view.writes_M].mean(1),
    "largest": lambda view: view["share"].max(1),
    "root": lambda view: np.sqrt(view["share"]).mean(1),
    "log": lambda view: np.log(view["share"]).mean(1),
    "kept log": lambda view: -np.log1p(-view["share"]).mean(1),
    "ranks": lambda view: rankdata(view["share"], axis=0).mean(1),
    "rows": lambda view: view["row"].mean(1),
    "amplitude": lambda view: view["amplitude"].mean(1),
    "damped": lambda view: view["damped"].mean(1),
    "damped by depth": lambda view: _weighted(view["damped"], 1 + view.depth_M.max() - view.depth_M),
    "error": lambda view: view["error"].mean(1),
    "error log": lambda view: np.log(view["error"]).mean(1),
    "error early": lambda view: _weighted(view["error"], 1 + view.depth_M.max() - view.depth_M),
    "error writers": lambda view: view["error"][:, view.writes_M].mean(1),
    "token error": lambda view: view["token error"].mean(1),
    "token error log": lambda view: np.log(view["token error"]).mean(1),
    "token error early": lambda view: _weighted(view["token error"], 1 + view.depth_M.max() - view.depth_M),
}


def is_wanda(trial: Trial, propagation: str = "dense") -> bool:
    """Return whether the trial is Wanda, unstructured and uniform."""
    values = trial.variant
    plain = (values["score"], values["pattern"], values["allocation"]) == ("wanda", "unstructured", "uniform")
    return plain and values["propagation"] == propagation


def rho(form: Callable[[View], Values], trials: Sequence[Trial], language: str) -> float:
    """Return Spearman's rho of a form with the measured loss of one language."""
    losses = [trial.loss[language] for trial in trials]
    return float(spearmanr(form(View(trials, language)), losses).statistic)


def by_sparsity(trials: Sequence[Trial]) -> dict[float, list[Trial]]:
    """Group the trials by sparsity, without groups of fewer than four."""
    groups: dict[float, list[Trial]] = {}
    for trial in sorted(trials, key=lambda one: one.variant["sparsity"]):
        groups.setdefault(trial.variant["sparsity"], []).append(trial)
    return {sparsity: group for sparsity, group in groups.items() if len(group) > 3}


def mean_rho(form: Callable[[View], Values], trials: Sequence[Trial]) -> float:
    """Return the mean of rho over languages and sparsities, which are never mixed."""
    groups = by_sparsity(trials).values()
    return fmean(rho(form, group, code) for group in groups for code in group[0].loss)


def pair_kind(one: Trial, other: Trial) -> str | None:
    """Return what alone differs between two trials of a seed and a sparsity; None if more does, or nothing."""
    if (one.seed, one.variant["sparsity"]) != (other.seed, other.variant["sparsity"]):
        return None
    differ = {name for name, value in one.variant.items() if value != dict(other.variant)[name]}
    plain_text = all("/" not in (trial.variant["calibration"] or "/") for trial in (one, other))
    if "score" in differ and differ <= ({"score"} if plain_text else {"score", "calibration"}):
        return "rule"
    return next((kind for kind, name in PAIRS.items() if differ == {name}), None)


def ordered_rightly(form: Callable[[View], Values], trials: Sequence[Trial]) -> dict[str, float]:
    """Return for each kind of pair the share of pairs, over all languages, that the form orders rightly."""
    pairs = [(a, b, pair_kind(trials[a], trials[b])) for a, b in combinations(range(len(trials)), 2)]
    right: dict[str, list[bool]] = {}
    for language in trials[0].loss:
        values = form(View(trials, language))
        for a, b, kind in pairs:
            if kind:
                worse = trials[a].loss[language] > trials[b].loss[language]
                right.setdefault(kind, []).append(bool(values[a] > values[b]) == worse)
    return {kind: fmean(right[kind]) for kind in ("text", "rule", *list(PAIRS)[1:]) if kind in right}
