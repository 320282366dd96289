"""`python -m mlprune`."""

from mlprune.cli import main

main(prog_name="mlprune")
