"""Batches, sampling, and the interface of a DataModule."""
