"""Comparisons of many trained runs: `python -m benchmarks.study --help`."""
