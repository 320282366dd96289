"""What one trial is, and how it is written: calibration x score x sparsity x pattern x propagation.

calibration   mono:fr | translation:en-fr | mix:translation:en-fr=0.5,mono:hi=0.5
pattern       unstructured | n:m (n weights kept of every m along a row)
propagation   sequential | dense
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction

from mlprune.errors import SpecError
from mlprune.languages import name_of

LANGUAGES_OF_KIND = {"mono": 1, "translation": 2}


@dataclass(frozen=True)
class Demonstration:
    """Lines of a corpus set out as prompts, each line in every one of `languages`, in order."""

    kind: str
    languages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'-'.join(self.languages)}"

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> "Demonstration":
        kind, colon, rest = text.partition(":")
        languages = tuple(rest.split("-"))
        if not colon or len(languages) != LANGUAGES_OF_KIND.get(kind):
            raise SpecError(key, repr(text), "write mono:fr, translation:en-fr or mix:KIND=WEIGHT,...")
        for code in languages:
            name_of(code, key)
        if len(set(languages)) < len(languages):
            raise SpecError(key, repr(text), "a translation needs two different languages")
        return cls(kind, languages)


@dataclass(frozen=True)
class Calibration:
    """One demonstration, or a mixture of several: each counts for its weight; the weights sum to 1.

    A mixture's parts are kept in one order, so that it is the same trial however it was written.
    """

    parts: tuple[tuple[Demonstration, Fraction], ...]

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0][0])
        return "mix:" + ",".join(f"{part}={_decimal(weight)}" for part, weight in self.parts)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(code for part, _ in self.parts for code in part.languages))

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> "Calibration":
        if not text.startswith("mix:"):
            return cls(((Demonstration.parse(text, key), Fraction(1)),))
        parts = []
        for item in text.removeprefix("mix:").split(","):
            demonstration, _, weight = item.partition("=")
            if not re.fullmatch(r"\d?\.?\d{1,12}", weight) or Fraction(weight) == 0:
                raise SpecError(key, repr(text), f"the weight of {demonstration!r} must be a number in (0, 1]")
            parts.append((Demonstration.parse(demonstration, key), Fraction(weight)))
        if len({part for part, _ in parts}) < len(parts):
            raise SpecError(key, repr(text), "name each part of a mixture once")
        total = sum((weight for _, weight in parts), Fraction(0))
        if abs(total - 1) > Fraction(1, 1000):  # thirds are written 0.333
            raise SpecError(key, repr(text), f"the weights sum to {float(total):g}; they must sum to 1")
        return cls(tuple(sorted(parts, key=lambda part: str(part[0]))))


def _decimal(weight: Fraction) -> str:
    """The weight as the decimal that it was written as, to the last digit."""
    return format((Decimal(weight.numerator) / Decimal(weight.denominator)).normalize(), "f")


@dataclass(frozen=True)
class Pattern:
    """What a mask must satisfy. `unstructured`: the same count in every row; else `kept` of every `group`."""

    kept: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else "unstructured"

    @property
    def sparsity(self) -> Fraction | None:
        """The sparsity that the pattern fixes; None when it leaves it open."""
        return 1 - Fraction(self.kept, self.group) if self.group else None

    @classmethod
    def parse(cls, text: str, key: str = "pattern") -> "Pattern":
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[1]) < int(match[2]) <= 64:
            raise SpecError(key, repr(text), "write unstructured, or n:m (n weights kept of every m), as 2:4")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Variant:
    """One trial, in canonical form: a score that reads no moments has no calibration."""

    calibration: str | None
    score: str
    sparsity: float
    pattern: str
    propagation: str

    @property
    def key(self) -> str:
        """A content hash, the same in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A name that a person can read: `wanda 0.5 translation:en-fr`."""
        shape = f"{self.sparsity:.4g}" if self.pattern == "unstructured" else self.pattern
        parts = [self.score, shape, self.calibration or ""]
        return " ".join(filter(None, [*parts, "sequential" if self.propagation == "sequential" else ""]))
