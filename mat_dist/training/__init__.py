"""A run from its first step to its last: the loop, its records, its batches, and steps that are captured."""
