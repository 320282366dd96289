"""What a sweep is sent to a cluster as: the spec's file, what it names on this machine, and a command."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlprune.console import size_text
from mlprune.errors import SpecError
from mlprune.spec.loading import apply_assignments, read_yaml, sweeps_folder, to_assignments
from mlprune.spec.schema import DEFAULT_STORAGE, SweepSpec

# keys whose value may be a file or folder of the laptop, which then goes along; these words are none
SENT = (
    *("calibration.corpus", "calibration.code", "evaluation.xnli.data", "evaluation.reviews.data"),
    "evaluation.task_path",
)
WORDS = ("sample", "stdlib")
MOST_BYTES = 100 * 2**20  # sent along, in all: Ray keeps it in the head's memory
SPEC = "sweep.yaml"
RESULTS = "~/.mlprune/jobs"  # on the head


@dataclass(frozen=True)
class Parcel:
    """A sweep that is to run on the cluster."""

    spec: SweepSpec  # checked here; its paths are the cluster's, but for those that are sent
    text: str  # the spec's file
    assignments: tuple[str, ...]  # of all options
    dry_run: bool = False

    def settings(self) -> list[str]:
        """The assignments, and then those that make paths right over there.

        A job's folder is gone after it, so a relative folder that it writes to is the home's.
        """
        values = apply_assignments(read_yaml(self.text), self.assignments)
        moved = {key: f"{key}/{path.name}" for key, path in self.sent().items()}
        pipeline = values.get("pipeline")
        offload = pipeline.get("offload_folder") if isinstance(pipeline, dict) else None
        writes = {"storage": values.get("storage", DEFAULT_STORAGE), "pipeline.offload_folder": offload}
        folders = {key: str(folder) for key, folder in writes.items() if folder}
        relative = {key: f for key, f in folders.items() if "://" not in f and f[0] not in "/~"}
        moved |= {key: f"~/{folder}" for key, folder in relative.items()}
        return [*self.assignments, *to_assignments(moved)]

    def sent(self) -> dict[str, Path]:
        """What goes along, by key: files and folders that are on this machine."""
        found = {}
        for key in SENT:
            value: Any = self.spec
            for name in key.split("."):
                value = value and getattr(value, name)  # a section may be None
            if value and value not in WORDS and Path(value).exists():
                found[key] = Path(value).resolve()
        return found

    def pack(self, file: Path) -> None:
        """Write the job's folder as a zip file, the same bytes for the same content.

        Ray would pack a folder too, but without what a `.gitignore` in it names.
        """
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(SPEC), self.text)
            for key, path in self.sent().items():
                for part in _files(path):
                    name = zipfile.ZipInfo(str(Path(key, part.relative_to(path.parent))))
                    archive.writestr(name, part.read_bytes(), zipfile.ZIP_DEFLATED)

    def entrypoint(self, job_id: str) -> str:
        """The job's shell command. It first says which version of mlprune runs there."""
        options = [f"--set={setting}" for setting in self.settings()] + ["--dry-run"] * self.dry_run
        sweep = shlex.join(["mlprune", "sweep", SPEC, *options])
        return f"mlprune --version && mkdir -p {RESULTS} && exec {sweep} --json {result_file(job_id)}"


def parcel(name: str, spec: SweepSpec, assignments: Iterable[str], dry_run: bool) -> Parcel:
    """`spec` as it was loaded from `name`, a file or the name of a sweep that comes with mlprune.

    Raises SpecError when what goes along is too large.
    """
    file = Path(name)
    if "/" not in name and not file.is_file():
        file = sweeps_folder() / f"{name.removesuffix('.yaml')}.yaml"
    made = Parcel(spec, file.read_text(encoding="utf-8"), tuple(assignments), dry_run)
    left = MOST_BYTES
    for key, path in made.sent().items():
        size = sum(part.stat().st_size for part in _files(path))
        left -= size
        if left < 0:
            limit = f"{size_text(size)}, and {size_text(MOST_BYTES)} can be sent in all"
            raise SpecError(key, repr(str(path)), f"{limit}; put it on the cluster, and give its path there")
    return made


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())


def result_file(job_id: str) -> str:
    return f"{RESULTS}/{job_id}.json"
