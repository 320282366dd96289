"""The commands besides `mlprune sweep`, one module each, and what they share.

prune        one variant, written as a checkpoint
trim         a model with a smaller vocabulary
calibration  the calibration text of a variant, as a file
evaluate     the metrics of a model
measure      how large and how fast models are
analyze      hidden features and masks of several calibrations
plan         memory and time on given machines
compare      two trials, item by item
checkpoint   writes a checkpoint
"""
