"""Pictures and tables of results. Nothing here runs a model or computes a metric of a run.

features: numbers and tables of `mlprune analyze`
feature_pictures: its pictures
sweep_pictures: decides which pictures of a sweep are worth drawing, and draws them
lines: bits per byte against sparsity, per language
heat_map: the change of each language by each calibration
dot_plot: the loss of each language by each variant
claim_picture: the differences of tested claims
trade_off: the worst language against the mean
forecast_picture: forecasts against measured losses, per language
figures: what all pictures share
"""
