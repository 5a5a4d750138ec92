"""The command `python -m mat_dist.evaluate`; see `mat_dist.evaluation`. The function `mat_dist.evaluate(...)`; see
`mat_dist.api.evaluation`."""

import sys

from mat_dist.cli import also_function
from mat_dist.evaluation.__main__ import main

also_function(__name__, "mat_dist.api.evaluation")

if __name__ == "__main__":
    sys.exit(main())
