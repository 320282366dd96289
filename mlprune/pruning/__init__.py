"""The arithmetic of pruning, on plain tensors: torch, numpy and scipy only.

moments      sums over a calibration set at the input of a matrix
combinations norms of several texts as one, so that a mask serves all of them
ranks        the best rank of a weight over several texts
scores       the rules that rank weights, and the registry SCORES
sparsegpt    SparseGPT, which also updates the weights that it keeps
structured   which channels or heads are removed, and the repair of what reads them
allocation   how many weights each layer and matrix drops
outliers     the signal of the allocation owl
spectra      the signal of the allocation alpha
agreement    the signal of the allocations agreement and disagreement
sensitivity  the split of the budget by measured losses of single layers
energy       the share of energy that a mask drops, which forecasts its damage
masks        selection of the weights to keep, and packed masks
"""
