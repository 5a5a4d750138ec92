"""One table of the JSON files of a folder: python -m benchmarks.summary FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EPOCH = 50_000  # images of a CIFAR-10 epoch
COLUMNS = ("benchmark", "step s", "images/s", "50,000 images, s", "x naive", "x careful", "of the limit", "guards %",
           "peak MiB")


def row(name: str, result: dict[str, Any]) -> list[str]:
    """The cells of one file."""
    figures = result["figures"]
    step = figures["step_s"]["median"]
    batch = int(result["what"].split("batch ")[1].split(",")[0])
    memory = max(one.get("device_peak_mib", one["host_peak_mib"]) for one in figures["memory"])

    def of(key: str, kind: str = "wall", factor: float = 1.0, digits: int = 2) -> str:
        return f"{factor * figures[key][kind]['median']:.{digits}f}" if key in figures else ""

    return [name, f"{step:.3f}", f"{batch / step:,.0f}", f"{EPOCH * step / batch:.1f}", of("naive_over_step"),
            of("careful_over_step"), of("of_limit"), of("guards", "cpu", 100.0, 1), f"{memory:,.0f}"]


def main() -> int:
    """Print the table; code 2 where the folder has no results."""
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    files = sorted(folder.glob("*.json")) if folder else []
    if not files:
        print(f"mat_dist: error: no JSON files in {folder} (command line): write the folder of benchmarks/gpu.sh",
              file=sys.stderr)
        return 2
    results = {file.stem: json.loads(file.read_text()) for file in files}
    results = {name: one for name, one in results.items() if "step_s" in one["figures"]}
    first = next(iter(results.values()))
    table = Table(*COLUMNS, title=f"{first['device']}, torch {first['versions']['torch']}", title_justify="left")
    for name, result in results.items():
        table.add_row(*row(name, result))
    console = Console(width=140)
    console.print(table)
    for note in sorted({note for one in results.values() for note in one["figures"]["notes"]}):
        console.print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
