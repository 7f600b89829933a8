"""The store of reference scores under damage, kills and several runs at once: nothing scored twice, no bit changed."""

from __future__ import annotations

import random
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.faults.points import Spec
from tests.faults.test_damage import flip

ANSWERS = 36  # of 13 pairs to train on and 5 to evaluate on
SHORT = {"num_train_epochs": 1, "save_total_limit": 1}
# One answer at a time, so that scores do not depend on which others are scored with them.
ONE_BY_ONE = {**SHORT, "reference.batch_size": 1}
SLOWLY = {**SHORT, "reference.batch_size": 2}
AT_ONCE = {"prefopt.reference.fill.COMMIT": 0.0}
IMPATIENT = {"prefopt.reference.fill.POLL": 0.1}
SCORING = (("run", 0), ("begin", 0))


def account(said: str) -> tuple[int, int]:
    """How many answers a run found in the store, and how many it scored."""
    found = re.search(rf"of {ANSWERS} answers (\d+) found in the store, (\d+) scored", said)
    assert found is not None, said[-3000:]
    return int(found[1]), int(found[2])


def file_of(store: Path) -> Path:
    """The one file in a store."""
    (file,) = store.glob("logp-*.sqlite")
    return file


def drop_rows(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("DELETE FROM rows WHERE rowid IN (2, 5, 11)")


def change_a_score(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        (data,) = db.execute("SELECT data FROM rows WHERE rowid = 7").fetchone()
    whole = file.read_bytes()
    assert whole.count(data) == 1
    file.write_bytes(whole.replace(data, flip(data, random.Random(0))))


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def flipped(seed: int) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(flip(file.read_bytes(), random.Random(seed)))


def cut(share: float) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "removed": Path.unlink,
    "emptied": cut(0),
    "cut to 1 %": cut(0.01),
    "cut to 50 %": cut(0.5),
    "cut to 99 %": cut(0.99),
    "a text in its place": lambda file: file.write_text("not a database\n" * 100),
    "a folder in its place": replace_by_folder,
    "rows deleted": drop_rows,
    "one bit of a score flipped": change_a_score,
    **{f"one bit flipped, {seed}": flipped(seed) for seed in range(6)},
}


@pytest.fixture(scope="module")
def filled(bench, tmp_path_factory):
    """The store that a run has filled."""
    folder = tmp_path_factory.mktemp("filled")
    assert account(bench.finish("adapter", folder / "run", **ONE_BY_ONE)) == (0, ANSWERS)
    return folder / "store"


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_made_whole_and_changes_no_bit(bench, filled, tmp_path, ends_exactly, count, kind):
    store = Path(shutil.copytree(filled, tmp_path / "store"))
    DAMAGE[kind](file_of(store))
    count("damage cases of the store")
    said = ends_exactly("adapter", tmp_path / "one", **ONE_BY_ONE)
    found, scored = account(said)
    assert found + scored == ANSWERS
    if "flipped," not in kind:  # which may meet a byte that means nothing
        assert scored
    if scored == ANSWERS and kind != "removed":
        assert re.search(rf"reference store: {re.escape(str(file_of(store)))}.* damaged", said), said[-3000:]
    assert account(ends_exactly("adapter", tmp_path / "two", **ONE_BY_ONE)) == (ANSWERS, 0)


@pytest.mark.slow
def test_four_runs_that_start_together_score_each_answer_once(bench, tmp_path, ends_exactly):
    runs = [tmp_path / name for name in "abcd"]
    launches = [bench.start("adapter", run, constants=IMPATIENT, **SHORT) for run in runs]
    assert [launch.end() for launch in launches] == [[0]] * 4
    counts = [account(launch.said) for launch in launches]
    assert sum(scored for _, scored in counts) == ANSWERS, counts
    assert [bench.differences("adapter", run, **SHORT) for run in runs] == [[]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_another_run_takes_over_when_the_one_that_scores_is_killed(bench, tmp_path, ends_exactly, ranks):
    holder = pause_with_the_lease(bench, tmp_path)
    launches = [bench.start("adapter", tmp_path / name, ranks, constants=IMPATIENT, **SHORT) for name in "bc"]
    for launch in launches:
        launch.first.wait_for_text("is scoring for this store; waiting")
    holder.kill()
    assert [launch.end() for launch in launches] == [[0] * ranks] * 2
    assert sum(account(launch.said)[1] for launch in launches) == ANSWERS
    assert [bench.differences("adapter", tmp_path / name, ranks, **SHORT) for name in "bc"] == [[]] * 2
    assert account(ends_exactly("adapter", tmp_path / "a", **SHORT)) == (ANSWERS, 0)


@pytest.mark.slow
def test_another_run_takes_over_when_the_one_that_scores_hangs(bench, tmp_path):
    """Its lease ends for want of a sign of life; when it wakes up, it ends well too."""
    brief = {**IMPATIENT, "prefopt.reference.lease.LEASE_SECONDS": 1.0}
    holder = pause_with_the_lease(bench, tmp_path, brief)
    other = bench.start("adapter", tmp_path / "b", constants=brief, **SHORT)
    assert other.end() == [0], other.said[-3000:]
    assert account(other.said) == (0, ANSWERS)
    holder.first.signal(signal.SIGCONT)
    assert holder.end() == [0], holder.said[-3000:]
    assert [bench.differences("adapter", tmp_path / name, **SHORT) for name in "ab"] == [[]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_kill_at_each_operation_on_the_store(bench, tmp_path, ends_exactly, count, part):
    names = bench.operations("adapter", Spec("store", *SCORING), **SHORT)
    for number in range(part, len(names), 4):
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        bench.interrupted("adapter", run, Spec(str(run.parent / "store"), *SCORING, "kill", number), **SHORT)
        count("kills at an operation")
        account(ends_exactly("adapter", run, **SHORT))
        assert not list((run.parent / "store").glob("_*")), names[number]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "share"), [(1, 0.3), (1, 0.6), (1, 0.9), (2, 0.5)])
def test_a_run_that_is_killed_while_it_scores_keeps_what_it_had(bench, tmp_path, ends_exactly, count, ranks, share):
    operations = bench.operations("adapter", Spec("store", *SCORING), ranks, constants=AT_ONCE, **SLOWLY)
    taken, given_back = (number for number, (name, _) in enumerate(operations) if name.endswith(".lease"))
    number = taken + int(share * (given_back - taken))
    points = Spec(str(tmp_path / "store"), *SCORING, "kill", number)
    bench.interrupted("adapter", tmp_path / "run", points, ranks, constants=AT_ONCE, **SLOWLY)
    count("kills")
    found, scored = account(ends_exactly("adapter", tmp_path / "run", ranks, **SLOWLY))
    assert 0 < found < ANSWERS
    assert found + scored == ANSWERS


def pause_with_the_lease(bench, folder, constants=IMPATIENT):
    """A run in `folder/a` that stands still while it has the lease of the store in `folder`."""
    names = [name for name, _ in bench.operations("adapter", Spec("store", *SCORING), **SHORT)]
    after = 1 + next(number for number, name in enumerate(names) if name.endswith(".lease"))
    points = Spec(str(folder / "store"), *SCORING, "pause", after)
    launch = bench.start("adapter", folder / "a", points=points, constants=constants, **SHORT)
    assert launch.first.wait_for("paused"), launch.said[-3000:]
    return launch
