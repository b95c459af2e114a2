"""Export, and a deployment on this machine."""
