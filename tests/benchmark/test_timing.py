"""The order of turns, medians and ratios, on a clock that is told what to show."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prefopt.benchmark.timing import CpuClock, Spread, clock_of, ratio, take_turns


class ToldClock:
    """Every step takes what it returns, in seconds."""

    unit = "second"

    def seconds(self, step: Callable[[], object]) -> float:
        return float(step())  # type: ignore[arg-type]


def test_ways_take_turns_step_by_step_and_the_order_turns_round():
    order: list[str] = []

    def way(name: str) -> Callable[[], int]:
        return lambda: order.append(name) or 1

    times = take_turns({"a": way("a"), "b": way("b")}, rounds=1, steps=2, clock=ToldClock(), warm_up=1)
    assert order == ["a", "b", "b", "a"] * 2
    assert times == {"a": [2.0], "b": [2.0]}


def test_a_round_is_the_sum_of_its_steps_and_the_warm_up_does_not_count():
    seconds = iter([100, 100, 1, 2, 3, 4])
    times = take_turns({"a": lambda: next(seconds)}, rounds=2, steps=2, clock=ToldClock())
    assert times == {"a": [3.0, 7.0]}


def test_ways_may_differ_in_speed():
    times = take_turns({"slow": lambda: 3, "fast": lambda: 1}, rounds=3, steps=1, clock=ToldClock())
    assert ratio(times["slow"], times["fast"]) == Spread(3.0, 3.0, 3.0)


def test_a_ratio_is_that_of_the_medians_and_drift_does_not_widen_it():
    """Times that double during the run, of two ways one of which always takes twice as long."""
    fast = [1.0, 1.2, 1.5, 1.7, 2.0]
    slow = [2 * seconds for seconds in fast]
    assert ratio(slow, fast) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_has_the_quartiles_of_its_rounds():
    found = ratio([2.0, 2.0, 2.0, 8.0, 0.5], [1.0] * 5)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == Spread(3.0, 2.0, 4.0)


def test_the_median_of_one_value_is_the_value():
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0)
    assert str(Spread(1.23456, 1.0, 2.0)) == "1.23 (1-2)"


def test_the_processor_clock_runs_and_belongs_to_the_processor():
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, CpuClock)
    assert clock.seconds(lambda: sum(range(100_000))) > 0
