"""Controls that adapt on the device or probe what an upload reveals."""
