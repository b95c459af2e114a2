"""Export of runs, and deployment on this machine."""
