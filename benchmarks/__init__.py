"""What mat_dist costs (`benchmarks.speed`) and what mutual training is worth (`benchmarks.study`), with results."""
