"""Somebody else's model: where it comes from, held in pieces, run layer by layer."""
