"""The short subset of the fault table, in a process of its own (it forks, and adopts orphans)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.alone  # timed
@pytest.mark.timeout(600)
def test_the_short_subset_of_the_fault_table_passes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "tests.faults", "--subset", "ci", "--results", str(results),
               "--keep", str(tmp_path / "files")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=580)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) >= 6 and all(row["passed"] for row in rows)
