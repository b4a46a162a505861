"""`python -m gptkern`, the same as `gptkern`."""

import sys

from gptkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
