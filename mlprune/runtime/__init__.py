"""Ray core: where workers run, how they are called, and what happens when they die.

ray_cluster     the running cluster or a private Ray; its nodes
placement       resources of shards and of trial processes
actors          the pipeline over Ray: an actor for each rank of a shard
replicas        replicas of a pipeline, and their repair
worker_errors   Ray's errors as errors of mlprune
worker_logging  logging in worker processes
"""
