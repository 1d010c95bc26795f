"""``python -m lmmjax``: the command line."""

import sys

from lmmjax.cli import program

if __name__ == "__main__":
    sys.exit(program())
