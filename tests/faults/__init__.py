"""The fault runner, `python -m tests.faults`: the fault table, injected from outside. docs/reliability.md."""
