"""How a run trains: command line, experiment, views of a dataset, checkpoints, loggers, processes."""
