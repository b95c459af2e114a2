"""Sizes on which device, cloud and training must agree."""

FEATURE_DIM = 192  # width of the encoder's tokens, and so of an anchor feature: 768 bytes in float32
