"""Damage of any kind is seen and said, costs no more than what it hit, and never becomes a score."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prefopt.reference import database, rows
from prefopt.reference.store import Entry, Store
from tests.reference.stores import (
    ABOUT,
    IDS,
    KEY,
    OTHER_KEY,
    ROWS,
    filled,
    in_child,
    right,
    status,
    wait_for,
    without_syncs,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    without_syncs(monkeypatch)


FILE = f"logp-{KEY[:32]}.sqlite"
ASIDE = f"_damaged-{FILE}"

Damage = Callable[[Path], object]


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    bit = int(len(content) * 8 * place)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def sql(*statements: str) -> Damage:
    def run(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            for statement in statements:
                db.execute(statement)

    return run


def directory(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def overwrite(path: Path, start: int, length: int, byte: bytes | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + length] = byte * length if byte else random.Random(0).randbytes(length)
    path.write_bytes(content)


def another_entry(path: Path) -> None:
    shutil.copy(filled(path.parent / "other", of=OTHER_KEY).path, path)


SWAP = "UPDATE rows SET form = b.form, data = b.data, checksum = b.checksum FROM rows b WHERE b.rowid = 7 - rows.rowid"

# The file cannot be used, and a new one takes its place.
OF_THE_FILE: dict[str, Damage] = {
    "cut to 300 bytes": lambda path: os.truncate(path, 300),
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "a directory in its place": directory,
    "garbage in its place": lambda path: path.write_bytes(random.Random(0).randbytes(20_000)),
    "text in its place": lambda path: path.write_text("moved to the other disk\n"),
    "another entry's file in its place": another_entry,
    "another database in its place": lambda path: (path.unlink(), sql("CREATE TABLE rows (id)")(path)),
    "its first page overwritten": lambda path: overwrite(path, 0, 4096),
    "a schema that is no text": lambda path: overwrite(
        path, path.read_bytes().index(b"CREATE TABLE rows") + 7, 5, b"\xff"
    ),
    "another version": sql(f"PRAGMA user_version = {database.VERSION + 1}"),
    "another key inside": sql("UPDATE header SET text = replace(CAST(text AS TEXT), 'tiny', 'huge')"),
    "no header": sql("DELETE FROM header"),
    "no rows table": sql("DROP TABLE rows"),
    "a column gone": sql("ALTER TABLE rows DROP COLUMN checksum"),
}
# Some rows are not what was written; the rest of the file is in order.
OF_ROWS: dict[str, tuple[Damage, int]] = {
    "a bit of a score": (sql("UPDATE rows SET data = X'00' || substr(data, 2) WHERE rowid = 5"), 1),
    "a shape": (sql("UPDATE rows SET form = CAST('<f4 1' AS BLOB) WHERE rowid IN (1, 2, 3)"), 3),
    "a type": (sql("UPDATE rows SET form = CAST('<u4' || substr(form, 4) AS BLOB) WHERE rowid = 9"), 1),
    "two rows swapped": (sql(SWAP + " AND rows.rowid IN (3, 4)"), 2),
    "no bytes at all": (sql("UPDATE rows SET data = 1.5, form = 'x' WHERE rowid = 120"), 1),
    "text that is no UTF-8": (sql("UPDATE rows SET form = CAST(X'FFFE' AS TEXT) WHERE rowid = 60"), 1),
    "every checksum": (sql("UPDATE rows SET checksum = zeroblob(16)"), 120),
}
FIRST: dict[str, Callable[[Entry], object]] = {
    "read": lambda entry: entry.read(IDS),
    "write": lambda entry: entry.write({IDS[0]: ROWS[IDS[0]]}),
    "missing": lambda entry: entry.missing(IDS),
    "verify": lambda entry: entry.verify(),
    "open": lambda entry: entry.open(),
}


def is_mended(entry: Entry) -> bool:
    """Whether only right values are read, and all of them once what is missing has been written."""
    found = entry.read(IDS)
    assert right(found)
    entry.write({id: ROWS[id] for id in entry.missing(IDS)})
    return right(entry.read(IDS)) and entry.missing(entry.read(IDS)) == set() and len(entry.read(IDS)) == len(IDS)


def check_that_it_is_set_aside(folder: Path, damage: Damage, first: str) -> None:
    told: list[str] = []
    entry = filled(folder, told)
    damage(entry.path)
    FIRST[first](entry)
    assert is_mended(entry) and is_mended(Store(folder, tell=told.append).entry(KEY, ABOUT))
    (line,) = told
    assert line.startswith(f"reference store: {entry.path} is damaged (") and ASIDE in line
    assert sorted(path.name for path in folder.glob("*logp*")) == [ASIDE, FILE]
    assert not list(folder.glob("_new*"))


@pytest.mark.parametrize("kind", OF_THE_FILE)
def test_a_damaged_file_is_set_aside_and_said_once(tmp_path, kind):
    check_that_it_is_set_aside(tmp_path, OF_THE_FILE[kind], "read")


@pytest.mark.parametrize("first", FIRST)
def test_a_damaged_file_is_found_by_whatever_comes_first(tmp_path, first):
    check_that_it_is_set_aside(tmp_path, OF_THE_FILE["garbage in its place"], first)


def test_a_byte_that_makes_a_file_read_only_is_damage(tmp_path):
    """SQLite then says what it says of a disk that takes no writes, and the file would never grow again."""
    check_that_it_is_set_aside(tmp_path, lambda path: overwrite(path, 18, 1), "write")


def test_a_last_page_that_is_cut_costs_what_was_on_it(tmp_path):
    entry = filled(tmp_path)
    os.truncate(entry.path, entry.path.stat().st_size - 2000)
    found = entry.read(IDS)
    assert right(found) and len(found) > 0.75 * len(IDS) and is_mended(entry)


@pytest.mark.parametrize("kind", OF_ROWS)
def test_a_damaged_row_is_removed_and_the_others_stay(tmp_path, kind):
    told: list[str] = []
    entry = filled(tmp_path, told)
    damage, number = OF_ROWS[kind]
    damage(entry.path)
    found = entry.read(IDS)
    assert right(found) and len(found) == len(IDS) - number
    plural = "s" * (number > 1)
    assert told == [
        f"reference store: {entry.path}: {number} damaged row{plural} removed, to be computed again when needed"
    ]
    assert entry.missing(IDS) == set(IDS) - set(found)
    assert is_mended(entry) and len(told) == 1
    assert not list(tmp_path.glob("_*"))


@pytest.mark.parametrize("kind", OF_ROWS)
def test_a_damaged_row_is_written_over(tmp_path, kind):
    entry = filled(tmp_path)
    OF_ROWS[kind][0](entry.path)
    entry.write(ROWS)
    assert right(entry.read(IDS)) and len(entry.read(IDS)) == len(IDS)


def test_a_row_that_another_process_wrote_anew_is_not_removed(tmp_path, monkeypatch):
    told: list[str] = []
    entry = filled(tmp_path, told)
    OF_ROWS["no bytes at all"][0](entry.path)  # the last row: when it is gone, a new one gets its number
    last, remove = max(IDS), Entry._remove

    def after_another_process(entry: Entry, numbers: list[int]) -> None:
        if numbers:
            other = Store(tmp_path, tell=[].append).entry(KEY, ABOUT)
            remove(other, numbers)
            other.write({last: ROWS[last]})
        remove(entry, numbers)

    monkeypatch.setattr(Entry, "_remove", after_another_process)
    assert entry.read(IDS).keys() == set(IDS) - {last}
    assert entry.read(IDS).keys() == set(IDS) and not told


def test_rows_that_are_gone_are_missing(tmp_path):
    told: list[str] = []
    entry = filled(tmp_path, told)
    sql("DELETE FROM rows WHERE rowid IN (4, 50, 120)")(entry.path)
    assert len(entry.missing(IDS)) == 3 and is_mended(entry) and not told


@pytest.mark.parametrize("place", [part / 20 + 0.003 for part in range(20)])
def test_a_flipped_bit_is_never_a_score(tmp_path, place):
    entry = filled(tmp_path)
    flip(entry.path, place)
    assert is_mended(Store(tmp_path).entry(KEY, ABOUT))


@pytest.mark.slow
def test_thousands_of_flipped_bits(tmp_path):
    entry = filled(tmp_path)
    whole, generator = entry.path.read_bytes(), random.Random(0)
    # SQLite's own header; at the end of the first page, the schema; then any.
    bits = [*range(800), *range(3400 * 8, 4096 * 8, 7), *(generator.randrange(len(whole) * 8) for _ in range(1000))]
    for number, bit in enumerate(bits):
        entry.path.write_bytes(whole)
        flip(entry.path, (bit + 0.5) / (len(whole) * 8))
        found = entry.read(IDS)
        assert right(found), bit
        if number % 2:
            entry.verify()
        entry.write(ROWS)
        assert right(entry.read(IDS)) and len(entry.read(IDS)) == len(IDS), bit


def test_a_damaged_page_costs_the_rows_on_it(tmp_path):
    """Rows before and behind it are read from the two ends."""
    told: list[str] = []
    entry = filled(tmp_path, told)
    pages = entry.path.stat().st_size // 4096
    for page in range(3, pages):
        told.clear()
        overwrite(entry.path, page * 4096, 64)
        entry.verify()
        found = entry.read(IDS)
        assert right(found) and told
        assert len(found) > 0.75 * len(IDS), page
        entry.write(ROWS)


def test_a_row_of_another_function_is_not_taken(tmp_path):
    entry, other = filled(tmp_path), filled(tmp_path, of=OTHER_KEY)
    sql(f"ATTACH '{other.path}' AS other", "DELETE FROM rows", "INSERT INTO rows SELECT * FROM other.rows")(entry.path)
    assert entry.read(IDS) == {}
    assert entry.missing(IDS) == set(IDS)


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is unreadable to root")
def test_a_file_that_may_not_be_read(tmp_path):
    told: list[str] = []
    entry = filled(tmp_path, told)
    entry.path.chmod(0)
    assert is_mended(entry) and "it cannot be read" in told[0]


def test_a_file_that_is_deleted_is_made_again(tmp_path):
    told: list[str] = []
    entry = filled(tmp_path, told)
    entry.path.unlink()
    assert entry.read(IDS) == {} and is_mended(entry)
    shutil.rmtree(tmp_path)
    assert entry.missing(IDS) == set(IDS) and is_mended(entry) and not told
    assert Store(tmp_path).entries()[0].about == ABOUT


def test_one_damaged_file_is_kept_of_each_entry(tmp_path):
    entry = filled(tmp_path)
    for content in ("first", "second"):
        entry.path.write_text(content)
        entry.open()
    assert (tmp_path / ASIDE).read_text() == "second"
    directory(entry.path)
    entry.open()
    assert (tmp_path / ASIDE / "inside").is_dir()
    entry.path.write_text("last")
    entry.open()
    assert (tmp_path / ASIDE).read_text() == "last"
    assert len(list(tmp_path.glob("_*"))) == 1


def test_a_journal_without_its_file_is_not_played_back(tmp_path):
    """It belongs to a file that is gone, and SQLite would write its pages into the next one of the name."""
    old = filled(tmp_path / "old")
    journal = old.path.with_name(f"{old.path.name}-journal")
    with closing(sqlite3.connect(old.path, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN")
        db.execute("UPDATE rows SET data = zeroblob(300)")
        left = journal.read_bytes()
        assert len(left) > 10_000
        db.execute("ROLLBACK")
    entry = Store(tmp_path).entry(KEY, ABOUT)
    entry.path.unlink()
    (tmp_path / journal.name).write_bytes(left)
    told: list[str] = []
    entry = Store(tmp_path, tell=told.append).entry(KEY, ABOUT)
    assert entry.missing(IDS) == set(IDS) and is_mended(entry) and not told


def test_damage_found_by_several_processes_is_mended_once(tmp_path):
    entry = filled(tmp_path)
    overwrite(entry.path, 3 * 4096, 4096)
    told = tmp_path / "told"
    told.write_text("")

    def mend() -> None:
        wait_for((tmp_path / "go").exists)
        mine: list[str] = []
        assert is_mended(Store(tmp_path, tell=mine.append).entry(KEY, ABOUT))
        with told.open("a") as file:
            file.writelines(line + "\n" for line in mine)

    children = [in_child(mend) for _ in range(4)]
    (tmp_path / "go").touch()
    assert [status(child) for child in children] == [0] * 4
    assert len(told.read_text().splitlines()) == 1
    assert is_mended(entry)


def test_what_another_process_has_mended_meanwhile_is_left_alone(tmp_path, monkeypatch):
    told: list[str] = []
    entry = filled(tmp_path, told)
    attempt = Entry._try

    def mended_after_a_first_look(entry: Entry, work: Callable[[sqlite3.Connection], object]) -> object:
        monkeypatch.undo()
        entry.path.unlink()
        filled(tmp_path)
        raise database.DamagedError("it is gone")

    monkeypatch.setattr(Entry, "_try", mended_after_a_first_look)
    assert len(entry.read(IDS)) == len(IDS) and not told
    assert Entry._try is attempt and not list(tmp_path.glob("_*"))


def test_a_kill_anywhere_while_a_damaged_file_is_replaced(tmp_path):
    def die_at(operation: int) -> None:
        left = operation

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "sqlite3.connect", "fcntl.flock"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(count)

    for operation in range(100):
        folder = tmp_path / str(operation)
        entry = filled(folder)
        overwrite(entry.path, 3 * 4096, 64)

        def mend(operation: int = operation, entry: Entry = entry) -> None:
            die_at(operation)
            entry.verify()

        ended = status(in_child(mend))
        assert is_mended(Store(folder, tell=[].append).entry(KEY, ABOUT))
        assert not list(folder.glob("_new*")) or ended, "left behind without a kill"
        if ended == 0:
            assert operation > 8, "the kills miss the operations"
            return
        entry.path.write_text("damaged once more")
        entry.open()
        assert not list(folder.glob("_new*"))
    raise AssertionError("it never ends")


def test_a_checksum_speaks_of_all_it_should():
    """Each part alone, changed alone, is seen."""
    id, form, data, checksum = rows.encode(KEY, IDS[0], ROWS[IDS[0]])
    assert rows.decode(KEY, id, form, data, checksum) is not None
    reshaped = form.replace(b"<f4 ", b"<f4 1 ")
    for changed in (
        (OTHER_KEY, id, form, data, checksum),
        (KEY, IDS[1], form, data, checksum),
        (KEY, id, reshaped, data, checksum),
        (KEY, id, form.replace(b"f4", b"u4"), data, checksum),
        (KEY, id, form, data[::-1], checksum),
        (KEY, id, form, data, checksum[::-1]),
        (KEY, id, form, data, None),
        (KEY, None, form, data, checksum),
        (KEY, id, form.decode(), data, checksum),
        (KEY, id, form, 7, checksum),
    ):
        assert rows.decode(*changed) is None
