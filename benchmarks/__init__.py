"""References that mat_dist is measured against (`python -m mat_dist.bench naive`), and results with device names."""
