"""Timing in turns: several ways of doing the same work, a step of each after the other, and ratios of their times.

A machine's speed drifts, and other programs share it. Ways that take turns meet the same drift, so their ratio holds
where their times do not; processor time leaves out what other programs took.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Step = Callable[[], object]


class Clock(Protocol):
    """Seconds that one call takes, and what kind of seconds they are."""

    unit: str

    def seconds(self, step: Step) -> float:
        """Call `step` once."""


class CpuClock:
    """Processor time of this process, all its threads together."""

    unit = "CPU-second"

    def seconds(self, step: Step) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start


class CudaClock:
    """Time on the GPU between the first and the last of what a step asks of it, gaps included."""

    unit = "CUDA-second"

    def seconds(self, step: Step) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles as `statistics.quantiles` has them, inclusive; those of a single value are the value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


Times = dict[str, list[float]]


def take_turns(ways: Mapping[str, Step], *, rounds: int, steps: int, clock: Clock, warm_up: int = 1) -> Times:
    """Seconds that each way needs for `steps` steps, by round: `{name: [rounds]}`.

    In a round every way does one step, then every way the next. The order turns round with each step, so that none
    always follows the same other. The first `warm_up` rounds are not counted.
    """
    order = list(ways)
    times: Times = {name: [] for name in order}
    for round in range(warm_up + rounds):
        gc.collect()  # now, rather than in the middle of someone's step
        total = dict.fromkeys(order, 0.0)
        for _ in range(steps):
            for name in order:
                total[name] += clock.seconds(ways[name])
            order.reverse()
        if round >= warm_up:
            for name, seconds in total.items():
                times[name].append(seconds)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """How many times the seconds `below` go into those `above`: the ratio of the medians.

    The spread is that of the ratios round by round, in which drift cancels.
    """
    rounds = Spread.of([a / b for a, b in zip(above, below, strict=True)])
    return Spread(statistics.median(above) / statistics.median(below), rounds.low, rounds.high)
