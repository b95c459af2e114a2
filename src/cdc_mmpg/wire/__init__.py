"""What device and cloud exchange, as bytes; no torch."""
