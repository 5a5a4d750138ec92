"""The command `python -m mat_dist.train`, and the function `mat_dist.train(...)`; see `mat_dist.api.training`."""

import sys

from mat_dist.api.training import main
from mat_dist.cli import also_function

also_function(__name__, "mat_dist.api.training")

if __name__ == "__main__":
    sys.exit(main())
