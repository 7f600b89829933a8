"""Several processes on one store: nothing is torn, nothing committed is lost, and nothing is computed twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.reference import database, lease
from prefopt.reference.store import Entry, Store
from tests.reference.stores import ABOUT, IDS, KEY, ROWS, in_child, kill, right, status, wait_for, without_syncs

MARKER = f"logp-{KEY[:32]}.lease"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    without_syncs(monkeypatch)


def opened(folder: Path) -> Entry:
    return Store(folder, tell=pytest.fail).entry(KEY, ABOUT)


def together(folder: Path, number: int, action: Callable[[int], object]) -> list[int]:
    """Run an action in several processes that start at the same moment; how each ended."""

    def wait_and_act(child: int) -> None:
        wait_for((folder / "go").exists)
        action(child)

    folder.mkdir(exist_ok=True)
    children = [in_child(lambda child=child: wait_and_act(child)) for child in range(number)]
    (folder / "go").touch()
    return [status(child) for child in children]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def note(path: Path, line: str) -> None:
    """Add a line at once, whoever else adds lines."""
    with path.open("a") as file:
        file.write(line + "\n")


def compute_what_is_missing(folder: Path, log: Path, pause: float = 0.0, at_a_time: int = 20) -> None:
    """What a run does: it takes the lease, or waits for the one who has it."""
    entry = opened(folder)
    while entry.missing(IDS):
        held = entry.lease()
        if held is None:
            time.sleep(0.005)
            continue
        with held:
            todo = [id for id in IDS if id in entry.missing(IDS)]
            for start in range(0, len(todo), at_a_time):
                part = todo[start : start + at_a_time]
                time.sleep(pause)
                entry.write({id: ROWS[id] for id in part})
                note(log, " ".join(id.hex() for id in part))
    assert right(entry.read(IDS)) and len(entry.read(IDS)) == len(IDS)


# ---- several at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repetition", range(3))
def test_four_runs_on_an_empty_store_compute_each_row_once(tmp_path, repetition):
    folder, log = tmp_path / "store", tmp_path / "log"
    assert together(tmp_path, 4, lambda _: compute_what_is_missing(folder, log, pause=0.005)) == [0] * 4
    computed = " ".join(lines(log)).split()
    assert sorted(computed) == sorted(id.hex() for id in IDS)


@pytest.mark.parametrize("repetition", range(3))
def test_an_entry_may_be_made_by_all_at_the_same_instant(tmp_path, repetition):
    def write_one(child: int) -> None:
        opened(tmp_path / "store").write({IDS[child]: ROWS[IDS[child]]})

    assert together(tmp_path, 8, write_one) == [0] * 8
    assert right(opened(tmp_path / "store").read(IDS))
    assert opened(tmp_path / "store").missing(IDS[:8]) == set()


def test_writers_and_readers_without_a_lease_do_no_harm(tmp_path):
    def work(child: int) -> None:
        entry, generator = opened(tmp_path / "store"), random.Random(child)
        for _ in range(15):
            entry.write({id: ROWS[id] for id in generator.sample(IDS, 30)})
            assert right(entry.read(IDS))

    assert together(tmp_path, 4, work) == [0] * 4
    entry = opened(tmp_path / "store")
    assert right(entry.read(IDS)) and len(entry.missing(IDS)) < 10
    entry.verify()


def test_two_entry_objects_see_each_other_s_rows(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    first.write({IDS[0]: ROWS[IDS[0]]})
    second.write({IDS[1]: ROWS[IDS[1]]})
    assert first.missing(IDS[:3]) == second.missing(IDS[:3]) == {IDS[2]}


# ---- kills --------------------------------------------------------------------------------------------------------


def check_a_kill_between_writes(folder: Path, generator: random.Random) -> None:
    log = folder / "log"

    def write_for_ever() -> None:
        entry = opened(folder / "store")
        while True:
            part = random.sample(IDS, 12)
            entry.write({id: ROWS[id] for id in part})
            note(log, " ".join(id.hex() for id in part))

    folder.mkdir()
    child = in_child(write_for_ever)
    enough = generator.randint(1, 6)
    wait_for(lambda: len(lines(log)) >= enough)
    time.sleep(generator.random() * 0.02)
    kill(child)
    committed = {bytes.fromhex(id) for line in lines(log) for id in line.split()}
    entry = opened(folder / "store")
    assert right(entry.read(IDS)) and committed <= set(entry.read(IDS))
    entry.verify()
    entry.write(ROWS)
    assert len(entry.read(IDS)) == len(IDS)


def test_a_kill_leaves_everything_that_was_committed(tmp_path):
    for number in range(12):
        check_a_kill_between_writes(tmp_path / str(number), random.Random(number))


@pytest.mark.slow
def test_two_hundred_kills_with_syncs(tmp_path, monkeypatch):
    monkeypatch.undo()
    for number in range(200):
        check_a_kill_between_writes(tmp_path / str(number), random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(10))
def test_runs_whose_holder_is_killed_again_and_again(tmp_path, repetition):
    folder, log = tmp_path / "store", tmp_path / "log"
    children = {in_child(lambda: compute_what_is_missing(folder, log, pause=0.02, at_a_time=5)) for _ in range(4)}
    for _ in range(3):
        time.sleep(0.1)
        owner = lease.Lease(folder / MARKER).holder()
        for child in [child for child in children if owner and owner.startswith(f"process {child} ")]:
            kill(child)
            children.remove(child)
    assert len(children) < 4, "no holder was killed"
    assert [status(child) for child in children] == [0] * len(children)
    computed = " ".join(lines(log)).split()
    assert len(set(computed)) == len(computed) and opened(folder).missing(IDS) == set()


# ---- the lease ----------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path) -> Iterator[int]:
    """A process that has the lease, and does nothing."""

    def hold() -> None:
        held = opened(tmp_path / "store").lease()
        (tmp_path / "held").touch()
        while held:
            time.sleep(1)

    opened(tmp_path / "store")
    child = in_child(hold)
    wait_for((tmp_path / "held").exists)
    yield child
    with suppress(ProcessLookupError):
        kill(child)


def test_one_process_has_the_lease_and_is_named(tmp_path, holder):
    entry = opened(tmp_path / "store")
    assert entry.lease() is None and entry.lease() is None
    assert f"process {holder} on {os.uname().nodename}, since " in str(entry.holder())
    assert entry.holder() == entry.holder(), "a message that is repeated only when it changes"
    entry.write(ROWS)
    assert right(entry.read(IDS)), "a lease keeps nobody from the rows"


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path, holder):
    entry = opened(tmp_path / "store")
    assert entry.lease() is None
    kill(holder)
    held = entry.lease()
    assert held is not None
    assert f"process {os.getpid()} " in str(entry.holder())
    held.release()


def test_a_lease_ends_when_it_is_given_back(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    held = first.lease()
    assert held is not None and second.lease() is None and first.lease() is None
    held.release()
    held.release()
    assert first.holder() is None
    with second.lease() as taken:
        assert taken is not None and first.lease() is None
    assert first.lease() is not None
    first.close()
    assert second.lease() is not None
    second.close()
    assert not (tmp_path / MARKER).exists()


def test_a_process_that_hangs_loses_its_lease(tmp_path, monkeypatch, request):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    os.kill(request.getfixturevalue("holder"), signal.SIGSTOP)
    entry = opened(tmp_path / "store")
    wait_for(entry.lease)


def test_a_machine_that_is_gone_loses_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    entry = opened(tmp_path)
    with entry.lease():
        marker = (tmp_path / MARKER).read_text()
    (tmp_path / MARKER).write_text(marker.replace(os.uname().nodename, "elsewhere"))
    assert entry.lease() is None and " on elsewhere" in str(entry.holder())
    wait_for(entry.lease)


@pytest.mark.slow
def test_a_process_that_works_for_long_keeps_its_lease(tmp_path, monkeypatch, request):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3.0)
    request.getfixturevalue("holder")
    entry, end = opened(tmp_path / "store"), time.monotonic() + 12
    while time.monotonic() < end:
        assert entry.lease() is None
        time.sleep(0.1)


def test_where_no_lease_can_be_had_everyone_gets_one(tmp_path):
    entry = opened(tmp_path)
    (tmp_path / MARKER).mkdir()
    with entry.lease() as first, opened(tmp_path).lease() as second:
        assert first and second


def test_a_lease_needs_no_room_on_the_disk(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise UserError("database or disk is full")

    entry = opened(tmp_path)
    monkeypatch.setattr(database, "note_lease", full)
    with entry.lease() as held:
        assert held is not None and entry.holder() == f"process {os.getpid()} on {os.uname().nodename}"
