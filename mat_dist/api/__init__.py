"""What programs may use, see docs/api.md; `mat_dist/__init__.py` gives it its names."""
