"""One shard's compute, and the pipeline of all shards of a model. Nothing here knows of Ray.

worker      a shard's worker: its layers, moments and masks
pipeline    all shards of a model in order: the interface to the model
masking     a variant's masks of one layer
structured_masks  the same, where whole units are removed
signals     the signal of a layer by which an allocation distributes sparsity
kept_masks  masks that are kept between the stages of a sweep
gathering   moments over ranks and from the store
decoding    greedy generation with key-value caches
likelihood  log-likelihood of scored tokens
features    measurements of a layer for an analysis
"""
