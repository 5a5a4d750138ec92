"""Time and memory of a training step on made-up images: `python -m benchmarks.speed --help`."""
