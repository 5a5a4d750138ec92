"""All cases, in files by what breaks; importing this package registers them."""

from __future__ import annotations

from tests.faults.cases import checkpoints, data, death, disk, evaluation, signals, start, values
from tests.faults.registry import CASES

__all__ = ["CASES", "checkpoints", "data", "death", "disk", "evaluation", "signals", "start", "values"]
