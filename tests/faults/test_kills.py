"""SIGKILL at random instants; the same command again ends with the bits of the undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

from tests.faults.bench import CASES, EPOCHS
from tests.faults.points import Spec
from tests.faults.prints import sealed_step

KILLS = int(os.environ.get("FAULTS_KILLS", "60"))
FAST = 3  # on every commit
SHORT = {"num_train_epochs": 1}


def numbered(count: int, fast: int):
    """Numbers of cases, of which the first `fast` are run on every commit."""
    return [pytest.param(number, marks=[] if number < fast else [pytest.mark.slow]) for number in range(count)]


def start_and_kill(bench, case, run, ranks=1, *, after, delay, only=None):
    """Kill a run `delay` seconds after an event; sooner when it turns out to be faster than it was."""
    while True:
        launch = bench.start(case, run, ranks)
        launch.first.wait_for(*after)
        time.sleep(delay)
        launch.kill(only)
        if not any(job.status == 0 for job in launch.jobs):
            # What was reported as saved is there.
            saves = [event["step"] for event in launch.first.events if event["event"] == "save"]
            assert sealed_step(run) >= max(saves, default=0)
            return
        shutil.rmtree(run)
        delay *= 0.7


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_the_middle_of_the_second_epoch(bench, tmp_path, ends_exactly, count, ranks):
    """And in the middle of what a line of the log is a mean of."""
    run = tmp_path / "run"
    bench.interrupted("adapter", run, Spec(str(run), ("save", 6), None, "kill", 0), ranks)
    assert sealed_step(run) == 6
    count("kills")
    ends_exactly("adapter", run, ranks)


@pytest.mark.parametrize("number", numbered(KILLS, FAST))
def test_a_killed_run_ends_as_if_nothing_had_happened(bench, tmp_path, ends_exactly, count, number):
    """Odd numbers are on two ranks in the second epoch or later, with both killed, or one and then the other."""
    rng = random.Random(number)
    case, ranks = list(CASES)[number // 2 % len(CASES)], 1 + number % 2
    whole = bench.whole(case, ranks)
    epoch = len(whole.steps) // EPOCHS
    start_and_kill(
        bench, case, tmp_path / "run", ranks,
        after=("step", epoch) if ranks == 2 else ("begin", 0),
        delay=rng.uniform(0, whole.seconds - (whole.steps[epoch] if ranks == 2 else 0.0)),
        only=(None, 0, 1)[number // 4 % 3] if ranks == 2 else None,
    )  # fmt: skip
    count("kills")
    count("kills on two ranks", ranks - 1)
    ends_exactly(case, tmp_path / "run", ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), [("adapter", 1), ("full", 1), ("kto", 2), ("moving", 2)])
def test_a_run_killed_again_and_again_still_ends_the_same(bench, tmp_path, ends_exactly, count, case, ranks):
    rng, run = random.Random(case), tmp_path / "run"
    for _ in range(6):
        launch = bench.start(case, run, ranks)
        launch.first.wait_for("begin")
        time.sleep(rng.uniform(0, bench.whole(case, ranks).seconds / 5))
        launch.kill()
        count("kills")
    ends_exactly(case, run, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_kill_before_the_first_step_costs_nothing(bench, tmp_path, ends_exactly, count, share):
    run = tmp_path / "run"
    start_and_kill(bench, "full", run, after=("start",), delay=share * bench.whole("full").begin)
    count("kills")
    ends_exactly("full", run)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_a_kill_at_each_operation_after_the_last_step(bench, tmp_path, ends_exactly, count, part):
    """The final model, the report and the mark that the stage is done."""
    names = bench.operations("adapter", Spec("run", ("end", 4)), **SHORT)
    for number in range(part, len(names), 3):
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        bench.interrupted("adapter", run, Spec(str(run), ("end", 4), None, "kill", number), **SHORT)
        count("kills at an operation")
        ends_exactly("adapter", run, **SHORT)
