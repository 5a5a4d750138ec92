"""Says where `python -m mat_dist.bench` went."""

from __future__ import annotations

import sys
from pathlib import Path

from mat_dist.cli import run_entry
from mat_dist.errors import ConfigError


def main() -> int:
    """Exit code 2."""
    return run_entry(refuse)


def refuse() -> None:
    """Raises ConfigError."""
    first = "" if Path("benchmarks/speed").is_dir() else "clone the repository, change into its root, and "
    raise ConfigError("the benchmarks are no longer a part of the package", "mat_dist.bench",
                      f"{first}run python -m benchmarks.speed step|naive|scale|memory, or "
                      "python -m benchmarks.study evidence|search|reasons")


if __name__ == "__main__":
    sys.exit(main())
