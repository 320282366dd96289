"""MLflow: one parent run per sweep, with one nested run per trial.

delivery        DeliveryQueue: updates that wait for a server that may be unavailable
lookup          what is read back from the runs of earlier sweeps, and links to them
mlflow_client   opening a client with our settings, and what MLflow's errors mean
moved_storage   paths of artifacts in a database that was moved
tracker         SweepTracker: what a sweep and its trials log
"""
