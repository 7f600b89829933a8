"""Runs all fault tests, the slow ones too, on two workers, and prints the table.

`python -m tests.faults [--kills N] [arguments for pytest]`
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

parser = argparse.ArgumentParser(prog="python -m tests.faults")
parser.add_argument("--kills", type=int, default=60, help="runs killed at a random instant")
options, rest = parser.parse_known_args()
os.environ["FAULTS_KILLS"] = str(options.kills)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.exit(pytest.main([str(Path(__file__).parent), "-m", "slow or not slow", "-n", "2", *rest]))
