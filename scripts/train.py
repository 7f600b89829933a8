"""accelerate launch scripts/train.py RECIPE [--key value ...]: train as the recipe says."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
