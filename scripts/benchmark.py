"""python scripts/benchmark.py dpo|tdpo|losses|reference|scaling [--rounds N] [--quick]: how fast, against what."""

import sys

from prefopt.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())
