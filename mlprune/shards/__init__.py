"""One model held in shards: a shard's work, the plan of which layers go where, and the pipeline of them."""
