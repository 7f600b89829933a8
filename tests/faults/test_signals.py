"""SIGTERM in each phase of a run: it ends within ten seconds, and the same command ends with the same bits.

Nothing is saved on schedule before the last step, so what a run goes on from is what it saved when it was told to end.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults.prints import sealed_step

SECONDS = 10.0
TERM, INT = 128 + signal.SIGTERM, 128 + signal.SIGINT
SETTINGS = {"save_steps": 12, "save_total_limit": 1}

PHASES: dict[str, tuple[str, int | None]] = {
    "before the model is there": ("start", None),
    "before the first step": ("begin", 0),
    "in the first step": ("step", 1),
    "in an evaluation": ("step", 6),
    "in the second epoch": ("step", 7),
    "in the last save": ("evaluate", 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_told_to_end_goes_on_exactly(bench, tmp_path, ends_exactly, count, ranks, phase):
    run = tmp_path / "run"
    launch = bench.start("adapter", run, ranks, **SETTINGS)
    event, step = PHASES[phase]
    launch.first.wait_for(event, step)
    assert launch.stop() < SECONDS
    count("SIGTERMs")
    # An evaluation is not waited for, so what was done since the last save is lost then, as in a kill.
    if event == "step" and step is not None and step % 3:
        assert [job.status for job in launch.jobs] == [TERM] * ranks, launch.said[-2000:]
        assert "stopped by SIGTERM" in launch.said
        assert sealed_step(run) >= step
    ends_exactly("adapter", run, ranks, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_is_told_to_end_ends_both(bench, tmp_path, ends_exactly, count, rank):
    run = tmp_path / "run"
    launch = bench.start("adapter", run, 2, **SETTINGS)
    launch.first.wait_for("step", 7)
    launch.jobs[rank].signal(signal.SIGTERM)
    assert [job.end() for job in launch.jobs] == [TERM, TERM], launch.said[-3000:]
    count("SIGTERMs")
    assert sealed_step(run) >= 7
    ends_exactly("adapter", run, 2, **SETTINGS)


@pytest.mark.slow
def test_a_run_that_is_interrupted_at_the_keyboard_says_so_and_goes_on(bench, tmp_path, ends_exactly):
    run = tmp_path / "run"
    launch = bench.start("full", run)
    launch.first.wait_for("step", 7)
    launch.first.signal(signal.SIGINT)
    assert launch.end() == [INT], launch.said[-3000:]
    assert "Traceback" not in launch.said
    assert sealed_step(run) >= 6
    ends_exactly("full", run)
