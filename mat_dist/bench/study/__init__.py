"""Comparisons of many trained runs: what is planned, the runs, what they scored, tables. No import has effects."""
