"""Prune multilingual language models, and find the calibration text that preserves your languages best."""

from importlib.metadata import version

__version__ = version("mlprune")
