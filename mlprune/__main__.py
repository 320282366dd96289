"""Run the command line with `python -m mlprune`."""

from mlprune.cli import main

main(prog_name="mlprune")
