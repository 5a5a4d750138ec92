"""Command line of the fault runner; see runner.py."""

from __future__ import annotations

import os
import sys

# Before torch and numpy are imported: a process with threads must not fork.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

if __name__ == "__main__":
    from tests.faults.runner import main

    sys.exit(main())
