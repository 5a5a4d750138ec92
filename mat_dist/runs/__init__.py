"""The run folder and what is told of a run: names, lock, exit record, metrics, console, logs."""
