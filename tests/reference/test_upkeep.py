"""`prefopt cache`: what is listed, what is found damaged, what goes and what stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from prefopt.reference.lease import Lease
from prefopt.reference.store import Store
from prefopt.reference.upkeep import gc, size, table, verify
from tests.reference.stores import ABOUT, IDS, KEY, ROWS, filled, in_child, kill, right, wait_for, without_syncs

KEYS = [f"{number}{KEY[1:]}" for number in range(4)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    without_syncs(monkeypatch)


@pytest.fixture
def store(tmp_path) -> Store:
    """Four entries, used four, three, two days ago and one day ago."""
    for days, key in zip((4, 3, 2, 1), KEYS, strict=True):
        used = time.time() - days * 86_400 - 60
        os.utime(filled(tmp_path, of=key).path, (used, used))
    return Store(tmp_path)


def path_of(store: Store, number: int) -> Path:
    return store.folder / f"logp-{KEYS[number][:32]}.sqlite"


def left(store: Store) -> list[int]:
    return [KEYS.index(info.key) for info in store.entries()]


def test_the_table(store):
    path_of(store, 0).write_text("damaged")
    heading, *lines = table(store.entries())
    assert heading.split() == ["key", "model", "kind", "rows", "size", "created", "last", "used"]
    assert len(lines) == 4
    last = lines.index(next(line for line in lines if line.startswith(KEYS[0][:12])))
    assert "damaged: file is not a database" in lines[last]
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 4 * 86_400 - 60))
    second = next(line for line in lines if line.startswith(KEYS[1][:12])).split()
    assert second[1:4] == ["tiny", "logp", "120"] and second[-2] > day
    assert table([]) == [heading.replace(heading, "key  model  kind  rows  size  created  last used")]


def test_sizes():
    assert [size(number) for number in (0, 48_200_000, 12_340_000_000)] == ["0.0 MB", "48.2 MB", "12.3 GB"]


# ---- verify -------------------------------------------------------------------------------------------------------


def test_a_store_in_order(store):
    used = [info.used for info in store.entries()]
    assert verify(store.folder) == []
    assert [info.used for info in store.entries()] == used, "a look is no use"
    assert verify(store.folder / "none yet") == []


def test_all_damage_is_named_and_gone_at_the_second_look(store):
    path_of(store, 1).write_text("damaged")
    content = path_of(store, 2).read_bytes()
    path_of(store, 2).write_bytes(content[:-2000])
    values = ROWS[IDS[0]].tobytes()
    entry = filled(store.folder)
    content = entry.path.read_bytes()
    assert content.count(values) == 1
    entry.path.write_bytes(content.replace(values, bytes(len(values))))
    lines = verify(store.folder)
    assert len(lines) == 3 and all(line.startswith("reference store: ") for line in lines)
    assert any(str(path_of(store, 1)) in line and "_damaged-" in line for line in lines)
    assert any(str(path_of(store, 2)) in line for line in lines)
    assert any(line.startswith(f"reference store: {entry.path}: 1 damaged row removed") for line in lines)
    assert verify(store.folder) == []
    assert entry.missing(IDS) == {IDS[0]}
    assert not path_of(store, 1).exists()
    assert right(Store(store.folder).entry(KEYS[3], ABOUT).read(IDS), of=KEYS[3])


# ---- gc -----------------------------------------------------------------------------------------------------------


def test_without_a_limit_only_damaged_files_go(store):
    path_of(store, 0).write_text("damaged")
    Store(store.folder, tell=[].append).entry(KEYS[0], ABOUT)
    (store.folder / "_new.sqlite").write_text("of a process that was killed")
    done = gc(store)
    assert [path.name for path, _ in done.removed] == [f"_damaged-{path_of(store, 0).name}", "_new.sqlite"]
    assert [number for _, number in done.removed] == [7, 28]
    assert sorted(left(store)) == [0, 1, 2, 3] and not list(store.folder.glob("_*"))


def test_those_used_longest_ago_go_until_it_fits(store):
    bytes_of_one = path_of(store, 0).stat().st_size
    done = gc(store, max_gb=2.5 * bytes_of_one / 1e9)
    assert [path for path, _ in done.removed] == [path_of(store, 0), path_of(store, 1)]
    assert left(store) == [2, 3] and store.bytes() <= 2.5 * bytes_of_one
    assert gc(store, max_gb=2.5 * bytes_of_one / 1e9).removed == []
    assert len(gc(store, max_gb=0).removed) == 2 and left(store) == []


def test_those_not_used_for_days_go(store):
    assert [path for path, _ in gc(store, older_than=2.5).removed] == [path_of(store, 0), path_of(store, 1)]
    assert left(store) == [2, 3]
    store.entry(KEYS[2], ABOUT)
    assert [path for path, _ in gc(store, older_than=0.5).removed] == [path_of(store, 3)]


def test_a_dry_run_says_the_same_and_deletes_nothing(store):
    path_of(store, 0).write_text("damaged")
    Store(store.folder, tell=[].append).entry(KEYS[0], ABOUT)
    before = sorted(store.folder.iterdir())
    said = gc(store, max_gb=1e-5, older_than=1.5, dry_run=True)
    assert sorted(store.folder.iterdir()) == before
    assert gc(store, max_gb=1e-5, older_than=1.5) == said and len(said.removed) == 5


def test_what_a_process_computes_for_stays(store):
    def hold() -> None:
        with store.entry(KEYS[0], ABOUT).lease():
            (store.folder / "held").touch()
            time.sleep(600)

    child = in_child(hold)
    wait_for((store.folder / "held").exists)
    done = gc(store, max_gb=0)
    assert done.in_use == [path_of(store, 0)] and left(store) == [0]
    kill(child)
    assert gc(store, max_gb=0).in_use == [] and left(store) == []
    assert not list(store.folder.glob("*.lease"))


def test_a_lease_of_another_machine_that_was_not_renewed_for_long_protects_nothing(store):
    path = path_of(store, 0).with_suffix(".lease")
    with Lease(path) as lease:
        lease.take()
        marker = path.read_text()
    path.write_text(marker.replace(os.uname().nodename, "elsewhere"))
    assert gc(store, max_gb=0).in_use == [path_of(store, 0)]
    os.utime(path, (time.time() - 3600,) * 2)
    assert gc(store, max_gb=0).in_use == [] and not path.exists()


def test_a_run_whose_entry_was_deleted_makes_it_again(store):
    entry = store.entry(KEYS[1], ABOUT)
    gc(store, max_gb=0)
    assert entry.missing(IDS) == set(IDS)
    entry.write(ROWS)
    assert right(entry.read(IDS)) and left(store) == [1]
