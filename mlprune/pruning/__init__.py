"""Arithmetic on tensors: moments and weights to scores, scores to masks. torch (and numpy) only."""
