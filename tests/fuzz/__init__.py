"""Fuzzers: random and mutated input ends in a result or in one line, never in a traceback.

specs         values of a spec, and its text
corpora       files of parallel text
checkpoints   config.json, tokenizer and weight files of a model
mlflow        the sqlite database of a storage

A few hundred cases run with all tests; `make fuzz` runs thousands, other ones each time.
"""
