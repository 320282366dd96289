"""Text to token batches: parallel corpora, demonstrations, calibration and evaluation sets."""
