"""The arithmetic of pruning, on plain tensors: torch and numpy only.

moments      sums over a calibration set at the input of a matrix
combinations norms of several texts as one, so that a mask serves all of them
ranks        the best rank of a weight over several texts
scores       the rules that rank weights, and the registry SCORES
sparsegpt    SparseGPT, which also updates the weights that it keeps
allocation   how sparse each layer becomes
energy       the share of energy that a mask drops, which forecasts its damage
masks        selection of the weights to keep, and packed masks
"""
