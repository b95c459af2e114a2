"""Metrics, and the results that a test writes."""
