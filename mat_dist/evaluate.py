"""The command `python -m mat_dist.evaluate`; see `mat_dist.evaluation`."""

import sys

from mat_dist.evaluation.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
