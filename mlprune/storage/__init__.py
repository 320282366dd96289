"""What outlives a process: files in a folder or an object store.

files     Storage: read files, and write them whole or not at all
lock      sweep_lock: one driver per sweep in a local storage
moments   MomentStore: calibration moments of the dense model, one file per layer
scratch   temporary folders that the next process removes if this one is killed
results   ResultStore: metrics and answers of finished trials
"""
