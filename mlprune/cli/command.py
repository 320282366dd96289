"""What all commands share: the group, common options, and how errors and signals end a command.

A command is a function that builds a spec, calls one function, prints what that returns, and returns values for
--json.
Heavy imports stand inside the commands, so that `--help` and mistyped options respond at once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from mlprune.errors import MlpruneError, StorageError, Terminated, UserError
from mlprune.runtime.restarts import forbid_restarts

if TYPE_CHECKING:
    from mlprune.spec.schema import SweepSpec

Values = dict[str, object]  # a command's result, as --json writes it
VERBOSITY = {"quiet": -1, "normal": 0, "verbose": 1}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlprune")
def main() -> None:
    """Prune multilingual language models, and find the calibration text that preserves your languages best."""


def command(function: Callable[..., Values]) -> click.Command:
    """Turn a function into a command with the common options; an error of the user becomes one line."""

    @functools.wraps(function)
    def run(debug: bool, verbosity: str, json_file: str | None, **options: object) -> None:
        from mlprune.console import configure_logging

        configure_logging(VERBOSITY[verbosity])
        signal.signal(signal.SIGTERM, _terminate)
        try:
            _check_json(json_file)
            values = function(**options)
        except (KeyboardInterrupt, Terminated) as stop:
            _stopped(stop)
        except UserError as error:
            _fail(error, debug, 2)
        except MlpruneError as error:
            _fail(error, debug, 1)
        else:
            if json_file is not None:
                _write_json(json_file, values)
            if values.get("failed"):  # some trials of a sweep failed; the results of the others are written
                sys.exit(1)

    decorated: Callable[..., None] = run
    for option in reversed(_COMMON_OPTIONS):
        decorated = option(decorated)
    return main.command(name=function.__name__)(decorated)


_COMMON_OPTIONS = (
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key of the spec; may be repeated."
    ),
    click.option(
        "--json", "json_file", metavar="FILE", help="Write the result as JSON to FILE; - is standard output."
    ),
    click.option(
        "-v", "--verbose", "verbosity", flag_value="verbose", default="normal", help="Print debug messages too."
    ),
    click.option(
        "-q", "--quiet", "verbosity", flag_value="quiet", help="Print only warnings and errors; no progress."
    ),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
corpus_option = click.option(
    "--corpus", metavar="PATH", help="Parallel text: sample, a folder, a file, or a Hugging Face dataset."
)
base_spec = click.option(
    "--spec", default="quickstart", show_default=True, help="The spec that provides all other settings."
)
new_folder = click.option("--output", required=True, type=click.Path(path_type=Path), help="A new folder.")


def _check_json(file: str | None) -> None:
    """Raise StorageError before any work if the result cannot be written; with `-`, print tables on stderr."""
    from mlprune import console

    console.results.stderr = file == "-"
    if file not in (None, "-"):
        path = Path(file)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise StorageError("--json", repr(file), "name a file in an existing folder")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise StorageError("--json", repr(file), "not writable; name another file")


def _terminate(signum: int, frame: object) -> None:
    forbid_restarts()
    signal.signal(signum, signal.SIG_IGN)  # the second one would interrupt what the first one cleans up
    raise Terminated


def _stopped(stop: KeyboardInterrupt | Terminated) -> NoReturn:
    """Exit as shells expect of a process that a signal ends."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    click.echo(f"mlprune: stopped by {number.name}; run the same command to resume", err=True)
    sys.exit(128 + number)


def _fail(error: MlpruneError, debug: bool, code: int) -> None:
    if debug:
        raise error
    click.echo(f"mlprune: {' '.join(str(error).split())}", err=True)
    sys.exit(code)


def _write_json(file: str, values: Values) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False)
    if file == "-":
        click.echo(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def spec_of(name: str, assignments: tuple[str, ...], settings: Mapping[str, object]) -> SweepSpec:
    """Load the spec `name`; apply the options in `settings` and then every --set."""
    from mlprune.spec.loading import load_spec, to_assignments

    return load_spec(name, [*to_assignments(settings), *assignments])
