"""What the scripts of this folder share: policies over a few answers, a minimiser, and how findings are told."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefopt.scoring import TokenScores

torch.set_num_threads(1)


def seeds(description: str | None, default: int) -> range:
    """The seeds that the command line asks for with `--seeds N`."""
    return range(_parser(description, default).parse_args().seeds)


def options(description: str | None, default: int) -> argparse.Namespace:
    """What the command line of a script on real reviews says: `seeds`, `data` and `quick`."""
    parser = _parser(description, default)
    parser.add_argument("--data", type=Path, help="folder with reviews_pos.txt and reviews_neg.txt")
    parser.add_argument("--quick", action="store_true", help="everything tiny: to see that it runs")
    return parser.parse_args()


def _parser(description: str | None, default: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=default, help=f"how many (default {default})")
    return parser


def answers(policy: Tensor, reference: Tensor, *place: Tensor) -> TokenScores:
    """Answers of one token each: entries of two tables of log-probabilities, at these indices `[n]` of each axis."""
    logp = policy[place]
    return TokenScores(len(logp), torch.arange(len(logp)), logp, ref_logp=reference[place])


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float) -> Tensor:
    """The parameters after so many full-batch steps of Adam."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(parameters).backward()
        optimizer.step()
    return parameters.detach()


def told(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}"


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def conclude(claim: str, seen: bool) -> None:
    """Say whether a paper's claim was seen."""
    print(f"{'seen' if seen else 'not seen'}: {claim}")
