"""Evaluation tasks, the items that a run returns, and the metrics and comparisons computed from items.

build: builds the suite of tasks from a spec
suite: the two kinds of tasks, and all tasks of a sweep together
perplexity: likelihood of held-out lines
choices: XNLI and reviews, answered by the most likely filled template
translation: few-shot translation
harness: tasks of lm-evaluation-harness
items: results item by item, and their metrics
consistency: whether answers agree between languages
resampling: bootstrap samples of a run's metrics
loss: relative change of bits per byte against the dense model
forecasts: forecasts of damage against measured losses
estimates: intervals and tests from samples, over lines and seeds
significance: whether one run is better than another
knowledge: whether a model knows a language, by a compressor
tasks/: the harness tasks that ship with mlprune
"""
