"""In place of `python` for a launch script: what it starts is mat_dist.train, with faults inside.

python -m tests.faults.scripted FAULT_FILE [arguments of python]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Replace this process by Python with the train module exchanged for the victim."""
    faults = Path(argv[0]).read_text()
    words = []
    for word in argv[1:]:
        words += ["tests.faults.victim", faults] if word == "mat_dist.train" else [word]
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(sys.argv[1:])
