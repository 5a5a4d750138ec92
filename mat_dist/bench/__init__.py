"""The benchmark: `python -m mat_dist.bench step | naive | scale`."""
