"""The evaluation command for runs: attacks chunk by chunk, soundness checks, result files, comparisons."""
