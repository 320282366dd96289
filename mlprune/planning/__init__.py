"""Sizes, memory, plans and time estimates, computed without loading a weight.

machine      GPUs, memory and speed of the machines
model_size   sizes of a model, from its configuration
work         how many tokens and trials a job has
memory       the memory of one worker, by kind
planner      layers to shards, and where their weights are held
forecast     how long each phase of a sweep takes
"""
