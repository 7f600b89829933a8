"""accelerate launch scripts/evaluate.py MODEL --data FILE [--reference MODEL]: score a checkpoint on preferences."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
