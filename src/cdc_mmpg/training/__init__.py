"""Training of a run: command line, experiment, views of a dataset, checkpoints, loggers, processes."""
