"""JobPackage: what a cluster needs to run a sweep: the spec, the local files that it names, and a command.

How a package is submitted is in `jobs`.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlprune.console import size_text
from mlprune.errors import SpecError
from mlprune.spec.loading import apply_assignments, read_yaml, spec_file, to_assignments
from mlprune.spec.schema import DEFAULT_STORAGE, SweepSpec

# Keys whose value may be a file or folder on this machine, which is then sent along; a built-in name never is.
FILE_KEYS = (
    *("calibration.corpus", "calibration.code", "evaluation.xnli.data", "evaluation.reviews.data"),
    "evaluation.task_path",
)
BUILTIN_NAMES = ("sample", "stdlib")
MAX_BYTES = 100 * 2**20  # sent along in all: Ray keeps it in the memory of the cluster's head
SPEC_NAME = "sweep.yaml"
RESULTS_FOLDER = "~/.mlprune/jobs"  # on the cluster's head


@dataclass(frozen=True)
class JobPackage:
    """A sweep to be run on a cluster."""

    spec: SweepSpec  # as checked on this machine; paths that are not sent along are the cluster's
    text: str  # of the spec's file
    assignments: tuple[str, ...]  # from all options of the command line
    dry_run: bool = False

    def job_assignments(self) -> list[str]:
        """Return the assignments, followed by those that make paths valid on the cluster.

        The job's folder is deleted after the job, so a relative folder that the job writes to is moved to the home
        folder.
        """
        values = apply_assignments(read_yaml(self.text), self.assignments)
        moved = {key: f"{key}/{path.name}" for key, path in self.local_files().items()}
        pipeline = values.get("pipeline")
        offload = pipeline.get("offload_folder") if isinstance(pipeline, dict) else None
        outputs = {"storage": values.get("storage", DEFAULT_STORAGE), "pipeline.offload_folder": offload}
        folders = {key: str(folder) for key, folder in outputs.items() if folder}
        relative = {key: path for key, path in folders.items() if "://" not in path and path[0] not in "/~"}
        moved |= {key: f"~/{path}" for key, path in relative.items()}
        return [*self.assignments, *to_assignments(moved)]

    def local_files(self) -> dict[str, Path]:
        """Return what is sent along, by key: the files and folders that exist on this machine."""
        files = {}
        for key in FILE_KEYS:
            value: object = self.spec
            for name in key.split("."):
                value = value and getattr(value, name)  # a section may be None
            if isinstance(value, str) and value and value not in BUILTIN_NAMES and Path(value).exists():
                files[key] = Path(value).resolve()
        return files

    def pack(self, file: Path) -> None:
        """Write the job's folder as a zip file; the same content gives the same bytes.

        Ray could pack a folder itself, but it leaves out whatever a `.gitignore` in the folder names.
        """
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo(SPEC_NAME), self.text)
            for key, path in self.local_files().items():
                for part in _files_in(path):
                    name = zipfile.ZipInfo(str(Path(key, part.relative_to(path.parent))))
                    archive.writestr(name, part.read_bytes(), zipfile.ZIP_DEFLATED)

    def entrypoint(self, job_id: str) -> str:
        """Return the job's shell command. It first prints the version of mlprune that the cluster has."""
        options = [f"--set={setting}" for setting in self.job_assignments()] + ["--dry-run"] * self.dry_run
        sweep = shlex.join(["mlprune", "sweep", SPEC_NAME, *options])
        return f"mlprune --version && mkdir -p {RESULTS_FOLDER} && exec {sweep} --json {result_file(job_id)}"


def package_job(name: str, spec: SweepSpec, assignments: Iterable[str], dry_run: bool) -> JobPackage:
    """Return the package of `spec`, loaded from `name`: a file, or the name of a sweep that comes with mlprune.

    Raises SpecError if the local files that it names are too large to be sent.
    """
    package = JobPackage(spec, spec_file(name).read_text(encoding="utf-8"), tuple(assignments), dry_run)
    _check_size(package)
    return package


def _check_size(package: JobPackage) -> None:
    remaining = MAX_BYTES
    for key, path in package.local_files().items():
        size = sum(part.stat().st_size for part in _files_in(path))
        remaining -= size
        if remaining < 0:
            limit = f"{size_text(size)}, but at most {size_text(MAX_BYTES)} can be sent in all"
            raise SpecError(key, repr(str(path)), f"{limit}; copy it to the cluster, and use its path there")


def _files_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())


def result_file(job_id: str) -> str:
    """Return the path on the cluster's head of the JSON that the job writes."""
    return f"{RESULTS_FOLDER}/{job_id}.json"
