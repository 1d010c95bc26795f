"""``python -m lmmjax``: the command line."""

import sys

from lmmjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
