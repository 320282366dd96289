"""What one trial is: a variant, with its calibration, score, sparsity, pattern, allocation and propagation.

Holds the objects and their text form. What is allowed in combination is decided in `sweep/grid.py`, and the scores
themselves are in `pruning/scores.py`. The text form, as users write it:

    calibration   see `spec/calibrations.py`
    score         wanda | ... | contrastive:KEEP/AGAINST (two calibrations)
    pattern       unstructured | n:m (n weights kept of every m along a row) | channels | channels/MULTIPLE | heads
    allocation    uniform | owl | alpha | agreement | disagreement | sensitivity-mean | sensitivity-worst
    propagation   sequential | dense
    repair        none | least-squares
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypedDict, cast, get_args

from mlprune.errors import SpecError
from mlprune.spec.calibrations import Calibration, Demonstration

Propagation = Literal["sequential", "dense"]
Structure = Literal["channels", "heads"]  # whole units that are removed from every layer
Repair = Literal["none", "least-squares"]  # of the weights that read removed units
Allocation = Literal[
    "uniform", "owl", "alpha", "agreement", "disagreement", "sensitivity-mean", "sensitivity-worst"
]
MEASURED = ("sensitivity-mean", "sensitivity-worst")  # allocations by the losses of single pruned layers
OF_LANGUAGES = ("agreement", "disagreement", *MEASURED)  # allocations that read text of all evaluated languages


@dataclass(frozen=True)
class Scoring:
    """The name of a score, and the two calibrations that a contrastive score compares: (keep, against)."""

    name: str
    sides: tuple[Calibration, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}:{'/'.join(map(str, self.sides))}" if self.sides else self.name

    @classmethod
    def parse(cls, text: str, key: str = "score") -> "Scoring":
        """Parse `NAME` or `NAME:KEEP/AGAINST`. Raises SpecError, naming `key`; the name is checked elsewhere."""
        name, colon, rest = text.partition(":")
        if not colon:
            return cls(name)
        sides = rest.split("/")
        if len(sides) != 2 or not all(sides):
            raise SpecError(key, repr(text), f"{name} needs both sides; write {two_sides(name)}")
        return cls(name, tuple(Calibration.parse(side, key) for side in sides))


def two_sides(name: str) -> str:
    """Return an example of how a score with two calibrations is written."""
    return f"{name}: {{keep: translation:en-fr, against: code}}, or {name}:translation:en-fr/code"


@dataclass(frozen=True)
class Pattern:
    """What a mask must satisfy. `unstructured`: the same count in every row; `n:m`: `kept` of every `group`.

    `structure`: whole units are removed, the same number in every layer. `multiple`: as many channels stay as a
    multiple of it; 0 means 64 where their number is one, else 1.
    """

    kept: int = 0
    group: int = 0
    structure: Structure | None = None
    multiple: int = 0

    def __str__(self) -> str:
        if self.structure:
            return f"{self.structure}/{self.multiple}" if self.multiple else self.structure
        return f"{self.kept}:{self.group}" if self.group else "unstructured"

    @property
    def sparsity(self) -> Fraction | None:
        """The sparsity that an n:m pattern fixes; None for the others, where it is free."""
        return 1 - Fraction(self.kept, self.group) if self.group else None

    @classmethod
    def parse(cls, text: str, key: str = "pattern") -> "Pattern":
        """Parse the text form. Raises SpecError, naming `key`."""
        if text == "unstructured":
            return cls()
        if text == "heads":
            return cls(structure="heads")
        if match := re.fullmatch(r"channels(?:/([1-9]\d{0,5}))?", text):
            return cls(structure="channels", multiple=int(match[1] or 0))
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
        if not match or not 0 < int(match[1]) < int(match[2]) <= 64:
            remedy = "write unstructured, n:m (n weights kept of every m) such as 2:4, channels, or heads"
            raise SpecError(key, repr(text), remedy)
        return cls(int(match[1]), int(match[2]))


class VariantValues(TypedDict):
    """A variant as plain values, for JSON, YAML, MLflow and Ray Tune."""

    calibration: str | None  # KEEP/AGAINST for a score with two sides
    score: str
    sparsity: float
    pattern: str
    propagation: Propagation
    allocation: Allocation
    seed: int
    repair: Repair


@dataclass(frozen=True)
class Variant:
    """One trial, in canonical form: see `sweep.grid.canonical_variant`.

    `calibration` is None for a score that needs none, and for one that names its own two sides. `seed` draws the
    calibration text and random scores; it is 0 for a variant that uses neither.
    """

    calibration: Calibration | None
    score: Scoring
    sparsity: float
    pattern: Pattern = Pattern()
    propagation: Propagation = "dense"
    allocation: Allocation = "uniform"
    seed: int = 0
    repair: Repair = "none"

    def to_dict(self) -> VariantValues:
        """Return the variant as plain values, from which `from_dict` makes an equal one."""
        return {
            "calibration": self.calibration_text,
            "score": self.score.name,
            "sparsity": self.sparsity,
            "pattern": str(self.pattern),
            "propagation": self.propagation,
            "allocation": self.allocation,
            "seed": self.seed,
            "repair": self.repair,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Variant":
        """Return the variant that `to_dict` wrote. Raises KeyError or ValueError for anything else.

        Values without a seed or a repair were written by versions that had none; there, seed 0 means the spec's
        only seed.
        """
        if unknown := values.keys() - VariantValues.__annotations__.keys():
            raise ValueError(f"a variant has no {', '.join(sorted(unknown))}")
        propagation, allocation = values["propagation"], values["allocation"]
        repair = values.get("repair", "none")
        for value, kind in ((propagation, Propagation), (allocation, Allocation), (repair, Repair)):
            if value not in get_args(kind):
                raise ValueError(f"{value} is none of {', '.join(get_args(kind))}")
        try:
            calibration, score = parse_sides(cast(str | None, values["calibration"]), str(values["score"]))
            pattern = Pattern.parse(str(values["pattern"]))
        except SpecError as error:
            raise ValueError(str(error)) from error
        sparsity, seed = float(cast(float, values["sparsity"])), int(cast(int, values.get("seed", 0)))
        return cls(
            calibration,
            score,
            sparsity,
            pattern,
            cast(Propagation, propagation),
            cast(Allocation, allocation),
            seed,
            cast(Repair, repair),
        )

    @property
    def calibration_text(self) -> str | None:
        """All that it is calibrated on, as text: `mono:fr`, `KEEP/AGAINST`, or None."""
        return "/".join(map(str, self.sides)) or None

    @property
    def calibration_label(self) -> str:
        """All that it is calibrated on, for people: `mono:fr`, `rank:mono:en+fr`, `KEEP/AGAINST`, or empty."""
        return "/".join(side.label for side in self.sides)

    @property
    def key(self) -> str:
        """A content hash of the plain values, the same in every process and version.

        Seed 0 and no repair are left out, so that the key is the one of versions without them.
        """
        plain = {"seed": 0, "repair": "none"}
        values = {name: value for name, value in self.to_dict().items() if (name, value) not in plain.items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def without_seed(self) -> "Variant":
        """What all seeds of a variant have in common."""
        return replace(self, seed=0)

    @property
    def label(self) -> str:
        """A readable name: `wanda 0.5 translation:en-fr`."""
        parts = [self.score.name, self.shape, self.calibration_label, *self.special, self._seed_text]
        return " ".join(filter(None, parts))

    @property
    def short(self) -> str:
        """A readable name for narrow columns, what differs most first: `en-fr 0.5 wanda`."""
        calibration = "/".join(side.short for side in self.sides)
        special = [word.replace("sequential", "seq") for word in self.special]
        return " ".join(filter(None, [calibration, self.shape, self.score.name, *special, self._seed_text]))

    @property
    def _seed_text(self) -> str:
        return f"seed {self.seed}" if self.seed else ""

    @property
    def shape(self) -> str:
        """The sparsity, or the n:m pattern that fixes it; with the pattern where it is not unstructured."""
        if self.pattern.group:
            return str(self.pattern)
        return f"{self.sparsity:.4g} {self.pattern}" if self.pattern.structure else f"{self.sparsity:.4g}"

    @property
    def special(self) -> tuple[str, ...]:
        """Allocation, repair and propagation where they are not the plain ones."""
        words = {"uniform": "", "none": "", "dense": "", "least-squares": "repaired"}
        every = (self.allocation, self.repair, self.propagation)
        return tuple(filter(None, (words.get(word, word) for word in every)))

    @property
    def sides(self) -> tuple[Calibration, ...]:
        """The calibrations that it reads: none, one, or (keep, against)."""
        return self.score.sides or ((self.calibration,) if self.calibration else ())

    @property
    def demonstrations(self) -> tuple[Demonstration, ...]:
        """The parts of all its calibrations, each once."""
        return tuple(dict.fromkeys(part for side in self.sides for part, _ in side.parts))


def parse_sides(calibration: str | None, score: str, key: str = "score") -> tuple[Calibration | None, Scoring]:
    """Parse a calibration and a score, where `KEEP/AGAINST` as the calibration belongs to the score.

    Raises SpecError; its key is `key` for the score and its sides, "calibration" for a calibration.
    """
    scoring = Scoring.parse(score, key)
    if calibration is not None and "/" in calibration and not scoring.sides:
        return None, Scoring.parse(f"{score}:{calibration}", key)
    return (Calibration.parse(calibration) if calibration else None), scoring
