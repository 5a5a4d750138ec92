"""Paired comparison of test results: python -m benchmarks.paired RUN ... -- RUN ...

The runs before `--` and after it belong together in order (the same seed each). For every pair, peer and kind of
weights the difference of robust accuracy, over all attacks, is taken image by image. The last column joins all pairs;
its interval is the wider one of images and runs, as in `mat_dist.bench evidence`.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mat_dist.evaluation.statistics import Difference, paired_difference

Target = tuple[str, str]  # name, weights


def robust(run: Path) -> dict[Target, dict[int, bool]]:
    """Which images withstood all attacks, of the run's newest `last` test."""
    files = sorted((run / "eval").glob("test_last_*.csv"))
    if not files:
        raise SystemExit(f"mat_dist: error: no test results in {run} (eval/test_last_*.csv): let the run end first")
    found: dict[Target, dict[int, bool]] = {}
    with files[-1].open(newline="") as file:
        for row in csv.DictReader(file):
            images, sample = found.setdefault((row["target"], row["weights"]), {}), int(row["sample"])
            images[sample] = images.get(sample, True) and row["robust"] == "1"
    return found


def differences(before: dict[Target, dict[int, bool]], after: dict[Target, dict[int, bool]]
                ) -> dict[Target, dict[int, float]]:
    """Robust after minus before of every image. Raises SystemExit where images or targets are not the same."""
    if {key: images.keys() for key, images in before.items()} != {key: images.keys() for key, images in after.items()}:
        raise SystemExit("mat_dist: error: two runs attacked other images or targets (eval/*.csv): compare equal ones")
    return {key: {image: float(after[key][image]) - was for image, was in images.items()}
            for key, images in before.items()}


def shown(found: Difference) -> str:
    """In points, with its interval."""
    return f"{100 * found.mean:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def main() -> int:
    """Print a row per target: each pair's difference with its interval over images, and all runs together."""
    if "--" not in sys.argv:
        print("mat_dist: error: no -- between the two groups (command line): write RUN ... -- RUN ...", file=sys.stderr)
        return 2
    middle = sys.argv.index("--")
    pairs = list(zip(map(Path, sys.argv[1:middle]), map(Path, sys.argv[middle + 1:]), strict=True))
    found = [differences(robust(a), robust(b)) for a, b in pairs]
    table = Table("target", "weights", *(f"{a.name} -> {b.name}" for a, b in pairs), "all runs",
                  title="robust accuracy, points", title_justify="left")
    for name, weights in found[0]:
        each = [one[name, weights] for one in found]
        table.add_row(name, weights, *(shown(paired_difference([one])) for one in each), shown(paired_difference(each)))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
