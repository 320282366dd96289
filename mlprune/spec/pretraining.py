"""The shares of languages in a model's pretraining text, and mixtures with these weights.

The shares come from the user's own table: they are in no model's configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlprune.errors import SpecError
from mlprune.spec.calibrations import Calibration, Demonstration
from mlprune.spec.languages import language_name
from mlprune.spec.mixtures import combined, rounded

KEY = "search.pretraining"
PREFIX = "pretraining:"
EXAMPLE = "write e.g. {en: 0.9, fr: 0.06}"
DIGITS = 6  # of the weights


@dataclass(frozen=True)
class Pretraining:
    """Each language's share of the text that a model was pretrained on, in any unit."""

    shares: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, values: object) -> Pretraining:
        """Read a mapping of languages to shares. Raises SpecError."""
        if not isinstance(values, dict) or not values:
            raise SpecError(KEY, repr(values), f"must be a section of languages and shares; {EXAMPLE}")
        for code, share in values.items():
            language_name(str(code), KEY)
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not 0 < share < math.inf:
                raise SpecError(f"{KEY}.{code}", repr(share), "must be a number greater than 0")
        return cls(tuple((str(code), float(share)) for code, share in values.items()))


def pretraining_mixture(text: str, table: Pretraining | None, key: str) -> Calibration:
    """Return `pretraining:mono:en,mono:fr` as the mixture of these parts, weighted by their languages' shares.

    Languages that pretraining saw more of weigh more, as in MBS (Multilingual Brain Surgeon, Zeng et al. 2024),
    which samples calibration text by them; here the statistics are weighted. Raises SpecError.
    """
    if table is None:
        raise SpecError(KEY, None, f"{text} needs each language's share of the pretraining text; {EXAMPLE}")
    parts = [Demonstration.parse(item, key) for item in text.removeprefix(PREFIX).split(",")]
    if len(set(parts)) < len(parts):
        raise SpecError(key, repr(text), "name each part once")
    shares = dict(table.shares)
    for part in parts:
        if part.kind != "mono":
            raise SpecError(key, repr(text), f"a share is that of one language; write mono:xx instead of {part}")
        if part.languages[0] not in shares:
            raise SpecError(key, repr(text), f"{KEY} has no share of {part.languages[0]}; add it")
    weights = rounded([shares[part.languages[0]] for part in parts], DIGITS)
    for part, weight in zip(parts, weights, strict=True):
        if not weight:
            raise SpecError(key, repr(text), f"the share of {part.languages[0]} is too small; leave {part} out")
    return combined(parts, weights)
