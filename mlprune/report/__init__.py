"""Results, as tables for a person (within 100 columns) and as plain values for a script."""
