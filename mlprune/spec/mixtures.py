"""The `mixture` section of a search: which mixtures' weights are searched, and how.

How a search is carried out is in `sweep/mixture_search.py`. Mixtures with fixed weights are in `calibrations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf, PlainSerializer, field_validator, model_validator

from mlprune.errors import SpecError
from mlprune.spec.calibrations import MIX, Calibration, Combination, Demonstration
from mlprune.spec.section import Count, Section

KEY = "search.mixture"
DIGITS = 3  # of searched weights, so that a trial's name is short
EQUAL = 1e-9  # weights that differ by less are equal

_AS_TEXT = PlainSerializer(str, return_type=str)


class _Mixture(Section):
    """What is mixed: two or more demonstrations, and how they are combined."""

    parts: tuple[Annotated[InstanceOf[Demonstration], _AS_TEXT], ...]
    combination: Annotated[InstanceOf[Combination], _AS_TEXT] = MIX

    @field_validator("parts", mode="before")
    @classmethod
    def _parse_parts(cls, values: object) -> object:
        if not isinstance(values, list | tuple):
            return values
        key = f"{KEY}.parts"
        parts = [
            Demonstration.parse(value, f"{key}[{n}]") if isinstance(value, str) else value
            for n, value in enumerate(values)
        ]
        for n, part in enumerate(parts):
            if part in parts[:n]:
                raise SpecError(f"{key}[{n}]", repr(str(part)), "name each part once")
        if len(parts) < 2:
            raise SpecError(key, list(map(str, parts)), "name two or more parts, e.g. [mono:en, mono:fr]")
        return parts

    @field_validator("combination", mode="before")
    @classmethod
    def _parse_combination(cls, value: object) -> object:
        return Combination.parse(value, f"{KEY}.combination") if isinstance(value, str) else value

    def calibration(self, weights: Sequence[float]) -> Calibration:
        """Return the parts with these weights, which are rounded. A part whose weight is 0 then is left out."""
        return combined(self.parts, rounded(weights, DIGITS), self.combination)


class OptunaMixture(_Mixture):
    """Optuna chooses weights by the forecasts of their masks; the most promising mixtures are evaluated."""

    searcher: Literal["optuna"]
    trials: Count = 60
    evaluate: Count = 3
    objective: Literal["mean", "worst"] = "worst"

    @model_validator(mode="after")
    def _evaluates_some(self) -> OptunaMixture:
        if self.evaluate > self.trials:
            raise SpecError(f"{KEY}.evaluate", self.evaluate, f"is more than the {self.trials} trials")
        return self


class MinimaxMixture(_Mixture):
    """Each round evaluates a mixture, and moves its weights towards the languages that lose most."""

    searcher: Literal["minimax"]
    rounds: Count = 8
    eta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6.0

    def languages(self, evaluated: Sequence[str]) -> tuple[str, ...]:
        """Return the language by whose loss each part is weighted, one for each part.

        It is that of monolingual text; of a translation, the one that no other part contains. Raises SpecError
        for a part without such a language among the `evaluated` ones.
        """
        own = [self._own_languages(part) for part in self.parts]
        for n, (part, codes) in enumerate(zip(self.parts, own, strict=True)):
            key, text = f"{KEY}.parts[{n}]", repr(str(part))
            if len(codes) != 1:
                remedy = "minimax needs a language that this part has and no other part; write mono:fr, say"
                raise SpecError(key, text, remedy)
            if codes[0] not in evaluated:
                remedy = f"minimax needs the loss in {codes[0]}; add it to evaluation.perplexity.languages"
                raise SpecError(key, text, remedy)
        return tuple(codes[0] for codes in own)

    def _own_languages(self, part: Demonstration) -> tuple[str, ...]:
        if part.kind == "mono":
            return part.languages
        others = {code for other in self.parts if other != part for code in other.languages}
        return tuple(code for code in part.languages if code not in others)


MixtureSpec = Annotated[OptunaMixture | MinimaxMixture, Field(discriminator="searcher")]
SEARCHERS: Mapping[str, type[OptunaMixture | MinimaxMixture]] = {
    "optuna": OptunaMixture,
    "minimax": MinimaxMixture,
}


def mixture_list(values: object) -> object:
    """Return one mapping as a list of one, and null as an empty list.

    Raises SpecError for an unknown searcher or a key of another one.
    """
    if values is None:
        return ()
    mixtures = values if isinstance(values, list | tuple) else [values]
    for mixture in mixtures:
        if isinstance(mixture, dict):
            _check_keys(mixture)
        elif not isinstance(mixture, Section):
            raise SpecError(KEY, repr(mixture), "must be a section of keys, or a list of such sections")
    return mixtures


def _check_keys(values: Mapping[str, Any]) -> None:
    searcher = values.get("searcher")
    section = SEARCHERS.get(searcher) if isinstance(searcher, str) else None
    if section is None:
        raise SpecError(f"{KEY}.searcher", repr(searcher), f"write {' or '.join(SEARCHERS)}")
    for name, value in values.items():
        if name not in section.model_fields:
            known = ", ".join(section.model_fields)
            raise SpecError(f"{KEY}.{name}", repr(value), f"unknown key; searcher {searcher} has {known}")


def combined(
    parts: Sequence[Demonstration], weights: Sequence[Fraction], combination: Combination = MIX
) -> Calibration:
    """Return the parts whose weight is not 0, in canonical form."""
    weighted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    return Calibration(
        tuple(sorted(weighted, key=lambda one: str(one[0]))), combination if len(weighted) > 1 else MIX
    )


def rounded(weights: Sequence[float], digits: int) -> list[Fraction]:
    """Return weights as decimals whose sum is exactly 1, by largest remainders; equal weights stay equal.

    The weights are at least 0, and not all of them are 0.
    """
    if max(weights) - min(weights) < EQUAL * max(weights):
        return [Fraction(1, len(weights))] * len(weights)
    units, total = 10**digits, sum(map(Fraction, weights))
    exact = [Fraction(weight) * units / total for weight in weights]
    whole = [math.floor(weight) for weight in exact]
    by_remainder = sorted(range(len(weights)), key=lambda n: (whole[n] - exact[n], n))
    for n in by_remainder[: units - sum(whole)]:
        whole[n] += 1
    return [Fraction(weight, units) for weight in whole]
