"""The command `mlprune`, and `python -m mlprune`."""

from mlprune.cli import main
from mlprune.runtime.restarts import allow_restarts


def run() -> None:
    """Run the command line as a process of its own, which may be started again when Ray dies under it."""
    allow_restarts()
    main(prog_name="mlprune")


if __name__ == "__main__":
    run()
