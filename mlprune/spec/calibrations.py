"""What a variant is calibrated on: demonstrations, and combinations of them. The arithmetic is in `pruning`.

    mono:fr | translation:en-fr | code
    mix:mono:en=0.4,mono:fr=0.6 | max:... | power=P:... | variance=LAMBDA:... | rank:...

Weights sum to 1; without weights, all parts have the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal, cast, get_args

from mlprune.errors import SpecError
from mlprune.spec.languages import language_name

LANGUAGES_OF_KIND = {"mono": 1, "translation": 2, "code": 0}
FORMS = (
    "write mono:fr, translation:en-fr, code, or several of them combined, "
    "e.g. mix:mono:en=0.4,mono:fr=0.6 or rank:mono:en,mono:fr"
)
LARGEST_PARAMETER = 100


@dataclass(frozen=True)
class Demonstration:
    """Text laid out as prompts: corpus lines, each in all of `languages` in order; or source code."""

    kind: str
    languages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'-'.join(self.languages)}" if self.languages else self.kind

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> Demonstration:
        """Parse `mono:fr`, `translation:en-fr` or `code`. Raises SpecError, naming `key`."""
        kind, colon, rest = text.partition(":")
        languages = tuple(rest.split("-")) if colon else ()
        if len(languages) != LANGUAGES_OF_KIND.get(kind):
            raise SpecError(key, repr(text), FORMS)
        for code in languages:
            language_name(code, key)
        if len(set(languages)) < len(languages):
            raise SpecError(key, repr(text), "a translation needs two different languages")
        return cls(kind, languages)


CombinationKind = Literal["mix", "max", "power", "variance", "rank"]


@dataclass(frozen=True)
class Combination:
    """How the statistics of several demonstrations become one: see `pruning/combinations.py`.

    `parameter` is the exponent of `power`, and the factor of the standard deviation in `variance`.
    """

    kind: CombinationKind = "mix"
    parameter: Fraction | None = None

    def __str__(self) -> str:
        return self.kind if self.parameter is None else f"{self.kind}={_decimal(self.parameter)}"

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> Combination:
        """Parse `mix`, `max`, `rank`, `power=P` or `variance=LAMBDA`. Raises SpecError, naming `key`."""
        name, equals, value = text.partition("=")
        if name not in get_args(CombinationKind):
            raise SpecError(key, repr(text), "write mix, max, rank, power=P or variance=LAMBDA")
        if name not in ("power", "variance"):
            if equals:
                raise SpecError(key, repr(text), f"{name} has no parameter; write {name}:...")
            return cls(cast(CombinationKind, name))
        if not re.fullmatch(r"\d{0,3}\.?\d{1,6}", value) or Fraction(value) > LARGEST_PARAMETER:
            remedy = f"{name} needs a number of at most {LARGEST_PARAMETER}; write e.g. {name}=2:mono:en,mono:fr"
            raise SpecError(key, repr(text), remedy)
        if name == "power" and not Fraction(value):
            raise SpecError(
                key, repr(text), "the exponent of power must be greater than 0; write e.g. power=2:..."
            )
        return cls(cast(CombinationKind, name), Fraction(value))


MIX = Combination()


@dataclass(frozen=True)
class Calibration:
    """One demonstration, or several that are combined, with weights that sum to 1.

    The parts are sorted, so that it is the same trial in whatever order it was written.
    """

    parts: tuple[tuple[Demonstration, Fraction], ...]
    combination: Combination = MIX

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0][0])
        written = [
            str(part) + (f"={_decimal(weight)}" if self._writes_weights else "") for part, weight in self.parts
        ]
        return f"{self.combination}:{','.join(written)}"

    @property
    def _writes_weights(self) -> bool:
        """Equal weights are left out. `mix` writes them where decimals can: stored results have such keys."""
        equal = Fraction(1, len(self.parts))
        if any(weight != equal for _, weight in self.parts):
            return True
        return self.combination == MIX and Fraction(_decimal(equal)) == equal

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(code for part, _ in self.parts for code in part.languages))

    @property
    def label(self) -> str:
        """A readable name: its text, in which parts of one kind share it: `rank:mono:en+fr`."""
        kinds = {part.kind for part, _ in self.parts}
        if len(self.parts) == 1 or len(kinds) > 1:
            return str(self)
        equal = len({weight for _, weight in self.parts}) == 1
        weights = ["" if equal else f"={_decimal(weight)}" for _, weight in self.parts]
        parts = ("-".join(part.languages) + weight for (part, _), weight in zip(self.parts, weights, strict=True))
        return f"{self.combination}:{kinds.pop()}:{'+'.join(parts)}"

    @property
    def short(self) -> str:
        """Its languages: `fr`, `en-fr`, `en-fr+hi`, `rank en+fr`, with unequal weights `en-fr.75+hi.25`."""
        equal = len({weight for _, weight in self.parts}) == 1
        parts = "+".join(
            ("-".join(part.languages) or part.kind) + ("" if equal else _decimal(weight).lstrip("0"))
            for part, weight in self.parts
        )
        return parts if self.combination == MIX else f"{self.combination} {parts}"

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> Calibration:
        """Parse a demonstration, or a combination, e.g. `mix:PART=WEIGHT,...`. Raises SpecError, naming `key`."""
        head, _, rest = text.partition(":")
        if head.partition("=")[0] not in get_args(CombinationKind):
            return cls(((Demonstration.parse(text, key), Fraction(1)),))
        combination = Combination.parse(head, key)
        parts = _parts(rest, text, key)
        if len(parts) == 1:  # alone, a part is ranked as it is without a combination
            return cls(((parts[0][0], Fraction(1)),))
        return cls(tuple(sorted(parts, key=lambda part: str(part[0]))), combination)


def _parts(items: str, text: str, key: str) -> list[tuple[Demonstration, Fraction]]:
    """Parse `PART,...` or `PART=WEIGHT,...`."""
    written = [item.partition("=") for item in items.split(",")]
    weighted = [name for name, equals, _ in written if equals]
    if weighted and len(weighted) < len(written):
        raise SpecError(key, repr(text), "write a weight for every part, or for none")
    parts = [
        (Demonstration.parse(name, key), _weight(name, weight, text, key) if equals else Fraction(1, len(written)))
        for name, equals, weight in written
    ]
    if len({part for part, _ in parts}) < len(parts):
        raise SpecError(key, repr(text), "name each part once")
    total = sum((weight for _, weight in parts), Fraction(0))
    if abs(total - 1) > Fraction(1, 1000):  # thirds may be written 0.333
        raise SpecError(key, repr(text), f"the weights sum to {float(total):g}; they must sum to 1")
    return parts


def _weight(part: str, weight: str, text: str, key: str) -> Fraction:
    if not re.fullmatch(r"\d?\.?\d{1,12}", weight) or Fraction(weight) == 0:
        raise SpecError(key, repr(text), f"the weight of {part!r} must be a number in (0, 1]")
    return Fraction(weight)


def _decimal(number: Fraction) -> str:
    """Return the number as the decimal that it was written as, to its last digit."""
    return format((Decimal(number.numerator) / Decimal(number.denominator)).normalize(), "f")
