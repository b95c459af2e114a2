"""Frames, video and text: the same code on a device, without torch."""
