"""The HTML report of a run folder: python -m mat_dist.report RUN."""
