"""The cloud's service."""
