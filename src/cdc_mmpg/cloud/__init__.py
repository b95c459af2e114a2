"""The cloud service."""
