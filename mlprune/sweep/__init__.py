"""The sweep: from a spec to a ranking of trials.

grid            the lists of a search, as trials
mixtures        the searches for mixtures of a search
plan            what a sweep will do
set_names       the names of the calibration sets that trials read
prepare         checks a spec; all that is known before weights are loaded
session         opens the model: in this process or over Ray
allocations     how many weights each layer drops, and the measurements that this needs
structures      how many channels or heads a variant keeps
masks           gathers moments, makes masks
trial           one trial, and the dense model
objective       the metrics by which trials can be ranked
verdict         runs the stages in order, ranks the trials, confirms the best
stage           what a stage is: a round of trials
stage_runner    runs a stage on the model
screening       chooses by forecasts which variants are evaluated
searching       searches with Optuna, in batches
mixture_search  searches the weights of mixtures
racing          evaluates block by block, and drops the worst variants
tune_runner     runs a list of trials under Ray Tune
trial_outcome   how a trial ends, and Ray Tune's form of it
trial_progress  which trials are active, finished or failed
failure_policy  what happens to trials that lost a worker
monitor         observes a running sweep
status          the status of running sweeps, as files
ranking         orders finished trials
claims          tests the claims of the spec
sweep           the whole sweep
"""
