"""The commands besides `mlprune sweep`, one module each, and what they share.

prune        one variant, written as a checkpoint
evaluate     the metrics of a model
analyze      hidden features and masks of several calibrations
plan         memory and time on given machines
compare      two trials, item by item
checkpoint   writes a checkpoint
"""
