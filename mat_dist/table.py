"""The command `python -m mat_dist.table`; see `mat_dist.tools.table`."""

import sys

from mat_dist.tools.table import main

if __name__ == "__main__":
    sys.exit(main())
