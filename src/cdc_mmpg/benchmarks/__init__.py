"""Benchmarks of training, of service and device, and of the delay over a network."""
