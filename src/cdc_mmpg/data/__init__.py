"""Batches, and what a DataModule offers."""
