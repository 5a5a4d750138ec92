"""The preflight: everything that can be known to be wrong before a run. `python -m mat_dist.check --help`."""
