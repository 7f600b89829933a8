"""Two ranks on this machine, by a launcher that is patient with a busy one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A launcher whose own keep-alive comes 15 s late takes its only node for dead and ends the run.
PATIENT = ("--rdzv-conf", "keep_alive_max_attempt=60,read_timeout=300")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *PATIENT)


def on_two_ranks(*program: str, timeout: float = 600) -> None:
    """Run a program with its options on two ranks, from the root of the checkout; a hang is a failure."""
    command = [sys.executable, *TWO_RANKS, *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-8000:]}"
