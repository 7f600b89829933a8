"""`python -m prefopt`: the command line, for launchers that start a module."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
