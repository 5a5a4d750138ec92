"""The train command with faults inside; torchrun starts it in place of mat_dist.train.

torchrun ... -m tests.faults.victim FAULTS [words of mat_dist.train]     FAULTS: JSON list of `inject.Fault`
"""

from __future__ import annotations

import json
import os
import sys

from mat_dist import train
from tests.faults.inject import Fault, install


def main(argv: list[str]) -> int:
    """Install the faults of this rank, then train -> the exit code of the command."""
    faults = [Fault(**one) for one in json.loads(argv[0])]
    install(faults)
    rank = int(os.environ.get("RANK", "0"))
    more = [fault.text for fault in faults if fault.kind == "words" and fault.rank == rank]
    return train.main([*argv[1:], *more])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
