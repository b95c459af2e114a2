"""Networks of the method as plain modules, independent of Lightning, loggers and datasets."""
