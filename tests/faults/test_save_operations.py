"""A kill before each file operation of a save, and in the middle of each file it writes."""

from __future__ import annotations

import pytest

from prefopt.checkpoints import newest_whole
from tests.faults.points import Spec

SECOND = (("step", 2), ("save", 2))
FIRST = (("step", 1), ("save", 1))
SHORT = {"num_train_epochs": 1, "save_total_limit": 1}
PARTS = 8


def harms(operations: list[tuple[str, bool]], start: int, step: int) -> list[tuple[int, float | None]]:
    """Number of the operation, and share kept of the file that is being written: every `step`th from `start` on."""
    kept = [(None, 0.0, 0.5) if cuts else (None,) for _, cuts in operations]
    return [(number, cut) for number, cuts in enumerate(kept) for cut in cuts][start::step]


@pytest.fixture
def killed_at(bench, tmp_path, count):
    """Kill a run at an operation; the folder of the run."""

    def kill(case, window, number, cut=None, ranks=1, run=None):
        run = run or tmp_path / f"{number}-{cut}" / "run"
        run.parent.mkdir(exist_ok=True)
        begin, end = window
        bench.interrupted(case, run, Spec(str(run), begin, end, "kill", number, cut), ranks, **SHORT)
        count("kills at an operation")
        return run

    return kill


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "start", "step"),
    [*(("adapter", part, PARTS) for part in range(PARTS)), *(("full", part, 3 * PARTS) for part in (0, 8, 16))],
)
def test_a_kill_at_any_operation_of_a_save_loses_nothing(bench, killed_at, ends_exactly, case, start, step):
    """With one checkpoint kept, there is one that is whole at every moment after the first save."""
    for number, cut in harms(bench.operations(case, Spec("run", *SECOND), **SHORT), start, step):
        run = killed_at(case, SECOND, number, cut)
        assert newest_whole(run)[0] is not None, number
        ends_exactly(case, run, **SHORT)


@pytest.mark.slow
def test_a_kill_in_the_very_first_save_starts_afresh(bench, killed_at, ends_exactly):
    for number, cut in harms(bench.operations("adapter", Spec("run", *FIRST), **SHORT), 0, PARTS):
        run = killed_at("adapter", FIRST, number, cut)
        ends_exactly("adapter", run, **SHORT)


@pytest.mark.slow
def test_a_kill_of_the_rank_that_saves(bench, killed_at, ends_exactly):
    operations = bench.operations("adapter", Spec("run", *SECOND), 2, **SHORT)
    for number, cut in harms(operations, 3, PARTS):
        run = killed_at("adapter", SECOND, number, cut, ranks=2)
        assert newest_whole(run)[0] is not None, number
        ends_exactly("adapter", run, 2, **SHORT)


@pytest.mark.slow
def test_a_kill_while_the_remains_of_an_earlier_one_are_cleared_away(bench, killed_at, ends_exactly):
    """Going on, the run begins the same save, and first removes what was left of it."""
    names = [name for name, _ in bench.operations("adapter", Spec("run", *SECOND), **SHORT)]
    for number in range(0, 20, 3):
        run = killed_at("adapter", SECOND, names.index("sync checkpoint-2/optimizer.pt"), cut=0.01 * number)
        killed_at("adapter", SECOND, number, run=run)
        assert newest_whole(run)[0] is not None, number
        ends_exactly("adapter", run, **SHORT)
