"""The networks of the method as plain modules: nothing here knows Lightning, a logger or a dataset."""
