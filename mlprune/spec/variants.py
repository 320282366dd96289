"""What one trial is, and how it is written: calibration x score x sparsity x pattern x allocation x propagation.

calibration   mono:fr | translation:en-fr | code | mix:translation:en-fr=0.5,code=0.5
score         wanda | ... | contrastive:KEEP/AGAINST (two calibrations)
pattern       unstructured | n:m (n weights kept of every m along a row)
allocation    uniform | owl
propagation   sequential | dense
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction

from mlprune.errors import SpecError
from mlprune.spec.languages import language_name

LANGUAGES_OF_KIND = {"mono": 1, "translation": 2, "code": 0}


@dataclass(frozen=True)
class Demonstration:
    """Text set out as prompts: lines of a corpus, each in every one of `languages`, in order; or source code."""

    kind: str
    languages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'-'.join(self.languages)}" if self.languages else self.kind

    @classmethod
    def parse(cls, text: str, key: str = "calibration") -> "Demonstration":
        kind, colon, rest = text.partition(":")
        languages = tuple(rest.split("-")) if colon else ()
        if len(languages) != LANGUAGES_OF_KIND.get(kind):
            raise SpecError(key, repr(text), "write mono:fr, translation:en-fr, code or mix:KIND=WEIGHT,...")
        for code in languages:
            language_name(code, key)
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

    @property
    def short(self) -> str:
        """Its languages: `fr`, `en-fr`, `en-fr+hi`, of unequal parts `en-fr.75+hi.25`. How many tells the kind."""
        alike = len({weight for _, weight in self.parts}) == 1
        return "+".join(
            ("-".join(part.languages) or part.kind) + ("" if alike else _decimal(weight).lstrip("0"))
            for part, weight in self.parts
        )

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


@dataclass(frozen=True)
class Scoring:
    """A score's name; and for one that weighs two calibrations against each other, which two."""

    name: str
    sides: tuple[Calibration, ...] = ()  # keep, against

    def __str__(self) -> str:
        return f"{self.name}:{'/'.join(map(str, self.sides))}" if self.sides else self.name

    @classmethod
    def parse(cls, text: str, key: str = "score") -> "Scoring":
        name, colon, rest = text.partition(":")
        if not colon:
            return cls(name)
        sides = rest.split("/")
        if len(sides) != 2 or not all(sides):
            raise SpecError(key, repr(text), f"{name} needs both sides; write {two_sides(name)}")
        return cls(name, tuple(Calibration.parse(side, key) for side in sides))


def two_sides(name: str) -> str:
    """How a score that needs two calibrations is written."""
    return f"{name}: {{keep: translation:en-fr, against: code}}, or {name}:translation:en-fr/code"


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
    """One trial, in canonical form: a score that reads no moments has no calibration.

    Of a score with two sides, `calibration` is `KEEP/AGAINST`.
    """

    calibration: str | None
    score: str
    sparsity: float
    pattern: str
    propagation: str
    allocation: str = "uniform"

    @property
    def key(self) -> str:
        """A content hash, the same in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A name that a person can read: `wanda 0.5 translation:en-fr`."""
        shape = f"{self.sparsity:.4g}" if self.pattern == "unstructured" else self.pattern
        parts = [self.score, shape, self.calibration, *self.special]
        return " ".join(filter(None, parts))

    @property
    def short(self) -> str:
        """The same for narrow columns, what differs most first: `en-fr 0.5 wanda`."""
        shape = f"{self.sparsity:.4g}" if self.pattern == "unstructured" else self.pattern
        read = "/".join(side.short for side in self.sides)
        special = [word.replace("sequential", "seq") for word in self.special]
        return " ".join(filter(None, [read, shape, self.score, *special]))

    @property
    def special(self) -> tuple[str, ...]:
        """What sets the trial apart beside calibration, score and shape, in words."""
        sequential = ("sequential",) if self.propagation == "sequential" else ()
        return (*(() if self.allocation == "uniform" else (self.allocation,)), *sequential)

    @property
    def sides(self) -> tuple[Calibration, ...]:
        """The calibrations that it reads: none, one, or `keep` and `against`."""
        return tuple(Calibration.parse(side) for side in self.calibration.split("/")) if self.calibration else ()

    @property
    def demonstrations(self) -> tuple[Demonstration, ...]:
        """All that its calibrations are made of, each once."""
        return tuple(dict.fromkeys(part for side in self.sides for part, _ in side.parts))
