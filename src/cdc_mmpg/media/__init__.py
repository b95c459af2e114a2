"""Frames, video and text: no torch, the same on the device."""
