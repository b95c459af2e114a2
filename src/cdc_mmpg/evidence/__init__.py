"""Figures of finished runs, each with its sources."""
