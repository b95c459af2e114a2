"""Sizes that device, cloud and training must agree on."""

FEATURE_DIM = 192  # numbers of every token of the encoder, and so of an anchor feature: 768 bytes in float32
