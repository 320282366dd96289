"""Prune multilingual language models, and find out which calibration text keeps your languages alive."""

from importlib.metadata import version

__version__ = version("mlprune")
