"""What looks at a run without training: check, dry run, tables, hashes."""
