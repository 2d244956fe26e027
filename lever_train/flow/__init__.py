"""Many steps as one command: the pipeline of `lever run`, sweeps, the names of the legacy script.

May import everything in lever_train.
"""
