"""Controls that train on the device or read out of what is uploaded."""
