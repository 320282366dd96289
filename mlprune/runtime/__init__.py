"""Ray core: where workers run, how they are called, and what happens when they die.

connection      the running cluster or a private Ray
nodes           the nodes of the cluster that runs
restarts        a command whose Ray has died is started again
placement       resources of shards and of trial processes
actors          the pipeline over Ray: an actor for each rank of a shard
replicas        replicas of a pipeline, and their repair
worker_errors   Ray's errors as errors of mlprune
worker_logging  logging in worker processes
"""
