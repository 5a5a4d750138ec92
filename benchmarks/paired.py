"""Paired comparison of test results: python -m benchmarks.paired RUN ... -- RUN ...

The runs before `--` and after it belong together in order (the same seed each). For every pair and peer the difference
of robust accuracy is taken image by image. The interval counts both the images and the runs: a run-to-run deviation
cannot be seen from images.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mat_dist.intervals import paired_difference, seed_interval

Key = tuple[str, str, str, str]


def robust(run: Path) -> dict[Key, int]:
    """Whether each image withstood, by sample, attack, target and weights, of the run's newest `last` test."""
    files = sorted((run / "eval").glob("test_last_*.csv"))
    if not files:
        raise SystemExit(f"mat_dist: error: no test results in {run} (eval/test_last_*.csv): let the run end first")
    with files[-1].open(newline="") as file:
        return {(r["sample"], r["attack"], r["target"], r["weights"]): int(r["robust"]) for r in csv.DictReader(file)}


def differences(before: dict[Key, int], after: dict[Key, int]) -> dict[str, list[int]]:
    """Robust after minus before of every image, by target. Raises SystemExit where the images are not the same."""
    if before.keys() != after.keys():
        raise SystemExit("mat_dist: error: two runs attacked other images or targets (eval/*.csv): compare equal ones")
    found: dict[str, list[int]] = {}
    for key, value in before.items():
        found.setdefault(key[2], []).append(after[key] - value)
    return found


def main() -> int:
    """Print a row per target: each pair's difference with its interval over images, and all runs together."""
    if "--" not in sys.argv:
        print("mat_dist: error: no -- between the two groups (command line): write RUN ... -- RUN ...", file=sys.stderr)
        return 2
    middle = sys.argv.index("--")
    pairs = list(zip(map(Path, sys.argv[1:middle]), map(Path, sys.argv[middle + 1:]), strict=True))
    found = [differences(robust(a), robust(b)) for a, b in pairs]
    table = Table("target", *(f"{a.name} -> {b.name}" for a, b in pairs), "all runs", title="robust accuracy, points",
                  title_justify="left")
    for target in found[0]:
        cells, means = [], []
        for one in found:
            of_images = paired_difference([dict(enumerate(one[target]))])
            cells.append(f"{100 * of_images.mean:+.2f} ({100 * of_images.low:+.2f} to {100 * of_images.high:+.2f})")
            means.append(100 * of_images.mean)
        mean, half = seed_interval(means)
        table.add_row(target, *cells, f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})")
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
