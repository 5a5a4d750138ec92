"""Says where `python -m mat_dist.bench` went."""

from __future__ import annotations

import sys

from mat_dist.errors import ConfigError, error_line


def main() -> int:
    """Exit code 2."""
    error = ConfigError("the benchmarks are no longer a part of the package", "mat_dist.bench",
                        "in the root of the repository, python -m benchmarks.speed step|naive|scale|memory, or "
                        "python -m benchmarks.study evidence|search|reasons")
    print(error_line(error), file=sys.stderr)
    return error.code


if __name__ == "__main__":
    sys.exit(main())
