"""The `claims` section of the spec: comparisons that are fixed before the sweep runs, and tested by it.

Holds their text form and what it means in each language. How claims are tested is in `sweep/claims.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast, get_args

from pydantic import Field

from mlprune.errors import SpecError
from mlprune.spec.calibrations import Calibration
from mlprune.spec.evaluation import checked_languages
from mlprune.spec.section import Section
from mlprune.spec.variants import Allocation, Repair, Scoring

PLACEHOLDER = "{xx}"
DENSE = "dense"
RULE = "wanda"  # of a side that names none
FORMS = "write a calibration, a rule, or both, e.g. mono:fr or sparsegpt mono:fr, then an allocation, a repair"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the trials of this rule, calibration, allocation and repair.

    `allocation` or `repair` None: the first one of the search.
    """

    score: Scoring
    calibration: Calibration | None
    allocation: Allocation | None = None
    repair: Repair | None = None

    @classmethod
    def parse(cls, text: str, key: str) -> Side:
        """Parse `[RULE] [CALIBRATION] [ALLOCATION] [REPAIR]`, of which rule or calibration may be missing.

        Raises SpecError, naming `key`; whether the rule exists is not checked.
        """
        words = text.split()
        repair = cast(Repair, words.pop()) if words and words[-1] in get_args(Repair) else None
        allocation = cast(Allocation, words.pop()) if words and words[-1] in get_args(Allocation) else None
        last = words[-1] if words else ""
        calibrated = last == "code" or (":" in last and "/" not in last)  # the slash is a contrastive rule's
        rule = words[:-1] if calibrated else words
        if not words or len(rule) > 1:
            raise SpecError(key, repr(text), FORMS)
        calibration = Calibration.parse(last, key) if calibrated else None
        return cls(Scoring.parse(rule[0] if rule else RULE, key), calibration, allocation, repair)


@dataclass(frozen=True)
class Comparison:
    """What a claim compares in one language: its metric is lower for `better` than for `than`."""

    language: str | None  # None: the claim is not about single languages
    metric: str
    better: Side
    than: Side | None  # None: the dense model


class ClaimSpec(Section):
    """The claim that a metric is lower for some trials than for others. `{xx}` stands for each language."""

    claim: Annotated[str, Field(min_length=1)]
    better: str
    than: str  # or dense
    metric: str = f"loss.{PLACEHOLDER}"
    languages: tuple[str, ...] = ()

    def comparisons(self, key: str = "claims") -> tuple[Comparison, ...]:
        """Return what is compared: one comparison for each language, or one in all.

        Raises SpecError, naming a key in the section `key`.
        """
        templated = any(PLACEHOLDER in text for text in (self.better, self.than, self.metric))
        if templated and not self.languages:
            raise SpecError(f"{key}.languages", "[]", f"name the languages that {PLACEHOLDER} stands for")
        if self.languages and not templated:
            remedy = f"nothing in the claim contains {PLACEHOLDER}; leave the languages out"
            raise SpecError(f"{key}.languages", list(self.languages), remedy)
        languages = checked_languages(self.languages, f"{key}.languages")
        return tuple(self._comparison(code, key) for code in languages or (None,))

    def _comparison(self, language: str | None, key: str) -> Comparison:
        better, than, metric = (
            text.replace(PLACEHOLDER, language or PLACEHOLDER) for text in (self.better, self.than, self.metric)
        )
        side = Side.parse(better, f"{key}.better")
        other = None if than == DENSE else Side.parse(than, f"{key}.than")
        if side == other:
            raise SpecError(f"{key}.than", repr(than), "is the same as `better`; name two different trials")
        return Comparison(language, metric, side, other)


def check_claims(claims: Sequence[ClaimSpec]) -> None:
    """Raise SpecError for the first mistake in the text of the claims."""
    names = [one.claim for one in claims]
    for n, claim in enumerate(claims):
        if claim.claim in names[:n]:
            raise SpecError(f"claims[{n}].claim", repr(claim.claim), "name each claim once")
        claim.comparisons(f"claims[{n}]")
