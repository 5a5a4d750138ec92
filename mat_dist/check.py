"""The command `python -m mat_dist.check`; see `mat_dist.tools.check`."""

import sys

from mat_dist.tools.check.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
