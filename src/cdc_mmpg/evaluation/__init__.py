"""Metrics, and what a test writes down."""
