"""The command `python -m mat_dist.hashes`; see `mat_dist.tools.hashes`."""

import sys

from mat_dist.tools.hashes import main

if __name__ == "__main__":
    sys.exit(main())
