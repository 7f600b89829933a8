"""The store gives back what was written, bit for bit, says what it cannot do, and needs little for it."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from prefopt.errors import UserError
from prefopt.reference import database, store
from prefopt.reference.store import Store, default_folder
from tests.reference.stores import ABOUT, IDS, KEY, OTHER_KEY, ROWS, filled, in_child, right, status, without_syncs

ID = IDS[0]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    without_syncs(monkeypatch)


# ---- rows -------------------------------------------------------------------------------------------------------

ARRAYS = {
    "float32": np.linspace(-9, 0, 7, dtype=np.float32),
    "float64": np.array([1e-300, -0.0, np.nextafter(1.0, 2.0)]),
    "float16": np.array([-1.5, 6e-8], dtype=np.float16),
    "bfloat16 as its bits": np.array([0x3F80, 0xC2F7, 0x0000], dtype=np.uint16),
    "token ids": np.array([5, ~0, 2**31 - 1], dtype=np.int32),
    "two dimensions": np.arange(12, dtype=np.float32).reshape(3, 4),
    "no scored token": np.empty(0, dtype=np.float32),
    "no row of hidden states": np.empty((0, 16), dtype=np.float32),
    "other byte order": np.arange(3, dtype=">f4"),
    "not contiguous": np.arange(12, dtype=np.float32).reshape(3, 4).T,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_comes_back_as_it_was(tmp_path, kind):
    entry = Store(tmp_path).entry(KEY, ABOUT)
    entry.write({ID: ARRAYS[kind]})
    found = entry.read([ID])[ID]
    assert found.tobytes() == np.ascontiguousarray(ARRAYS[kind], ARRAYS[kind].dtype.newbyteorder("<")).tobytes()
    assert (found.shape, found.dtype) == (ARRAYS[kind].shape, ARRAYS[kind].dtype.newbyteorder("<"))
    assert found.flags.writeable


def test_what_was_not_written_is_missing(tmp_path):
    entry = Store(tmp_path).entry(KEY, ABOUT)
    assert entry.read(IDS) == {} and entry.missing(IDS) == set(IDS)
    entry.write({id: ROWS[id] for id in IDS[:50]})
    assert set(entry.read(IDS)) == set(IDS[:50]) and entry.missing(ROWS) == set(IDS[50:])
    assert entry.read([]) == {} and entry.missing([]) == set()
    entry.write({})


def test_another_run_finds_every_row(tmp_path):
    filled(tmp_path)
    found = Store(tmp_path).entry(KEY, {"model": "the same under another name"}).read(IDS)
    assert set(found) == set(IDS) and right(found)


def test_a_row_may_be_written_twice(tmp_path):
    entry = filled(tmp_path)
    size = entry.path.stat().st_size
    for _ in range(3):
        entry.write(ROWS)
    assert right(entry.read(IDS)) and entry.missing(IDS) == set()
    assert entry.path.stat().st_size < 2 * size


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the limit cannot be set")
def test_more_rows_than_a_statement_takes_variables(tmp_path, monkeypatch):
    connect = database._connect

    def old(path: Path, mode: str) -> sqlite3.Connection:
        db = connect(path, mode)
        db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)  # that of SQLite before 3.32
        return db

    monkeypatch.setattr(database, "_connect", old)
    ids = [number.to_bytes(32, "big") for number in range(4000)]
    entry = Store(tmp_path).entry(KEY, ABOUT)
    entry.write({id: np.float32([number]) for number, id in enumerate(ids[:-1])})
    found = entry.read(ids)
    assert len(found) == len(ids) - 1 and all(found[id][0] == number for number, id in enumerate(ids[:-1]))
    assert entry.missing(ids) == {ids[-1]}


@pytest.mark.parametrize(
    "bad", [np.float32([0, np.nan]), np.float64([np.inf]), np.uint16([0x7FC0]), np.uint16([0xFF80])]
)
def test_what_is_not_finite_is_never_kept(tmp_path, bad):
    entry = Store(tmp_path).entry(KEY, ABOUT)
    with pytest.raises(ValueError, match=f"row {IDS[1].hex()[:12]}: NaN or infinity is never kept"):
        entry.write({ID: ROWS[ID], IDS[1]: bad})
    assert entry.missing(IDS) == set(IDS), "a part of the rows was written"


def test_mistakes_of_the_caller_are_refused(tmp_path):
    entry = Store(tmp_path).entry(KEY, ABOUT)
    with pytest.raises(ValueError, match="has 32 bytes, not 3"):
        entry.write({b"abc": ROWS[ID]})
    with pytest.raises(ValueError, match="int64 is not kept"):
        entry.write({ID: np.arange(3)})
    for key, kind in (("../" * 12, "logp"), ("ab", "logp"), (KEY, "LogP"), (KEY, "../logp"), (KEY.upper(), "logp")):
        with pytest.raises(ValueError, match="a hash as its key"):
            Store(tmp_path).entry(key, ABOUT, kind=kind)


# ---- entries ----------------------------------------------------------------------------------------------------


def test_functions_and_kinds_keep_to_themselves(tmp_path):
    entry, other = filled(tmp_path), filled(tmp_path, of=OTHER_KEY)
    hidden = Store(tmp_path).entry(KEY, ABOUT, kind="hidden_states")
    assert hidden.missing(IDS) == set(IDS)
    assert right(entry.read(IDS)) and right(other.read(IDS), of=OTHER_KEY)
    assert {path.name for path in tmp_path.glob("*.sqlite")} == {
        f"logp-{KEY[:32]}.sqlite", f"logp-{OTHER_KEY[:32]}.sqlite", f"hidden_states-{KEY[:32]}.sqlite",
    }  # fmt: skip


def test_two_keys_that_begin_alike_are_two_functions(tmp_path):
    told: list[str] = []
    filled(tmp_path, told)
    other = Store(tmp_path, tell=told.append).entry(KEY[:-1] + "f", ABOUT)
    assert other.read(IDS) == {} and "it is the file of another entry" in told[0]


def test_the_list_of_entries(tmp_path):
    before = Store(tmp_path / "none yet")
    assert before.entries() == [] and before.bytes() == 0
    filled(tmp_path)
    filled(tmp_path, of=OTHER_KEY)
    (tmp_path / "notes.sqlite").write_text("not an entry")
    os.utime(tmp_path / f"logp-{KEY[:32]}.sqlite", (1e9, 1e9))
    first, second = Store(tmp_path).entries()
    assert (first.key, first.kind, first.rows, first.about, first.damaged) == (KEY, "logp", 120, ABOUT, None)
    assert (second.key, first.used) == (OTHER_KEY, 1e9)
    assert first.created is not None and first.created > 1e9
    assert first.bytes == first.path.stat().st_size
    assert Store(tmp_path).bytes() == sum(path.stat().st_size for path in tmp_path.iterdir())
    Store(tmp_path).entry(KEY, ABOUT)
    assert [info.key for info in Store(tmp_path).entries()] == [OTHER_KEY, KEY], "opening is a use"


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("PREFOPT_STORE", "")
    assert default_folder() == tmp_path / ".cache/prefopt/reference"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache/prefopt/reference"
    monkeypatch.setenv("PREFOPT_STORE", "~/scores")
    assert default_folder() == Store().folder == tmp_path / "scores"
    assert Store("~/elsewhere").folder == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["with spaces", "参照 é 🜚", "?mode=ro&x#%41", "a" * 200, "-rf", "'; DROP TABLE rows"])
def test_any_name_of_a_folder(tmp_path, name):
    entry = filled(tmp_path / name / name[:100])
    assert right(entry.read(IDS)) and entry.path.parent.parent == tmp_path / name


# ---- places that are no good -------------------------------------------------------------------------------------


def refused(action) -> str:
    """The message of a refusal, which has to name the two ways out."""
    with pytest.raises(UserError) as refusal:
        action()
    assert "reference: {store: DIR}" in str(refusal.value) and "reference: {source: live}" in str(refusal.value)
    return str(refusal.value)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "file/store: the folder cannot be made (Not a directory)" in refused(
        lambda: Store(tmp_path / "file" / "store").entry(KEY, ABOUT)
    )
    assert "(File exists)" in refused(lambda: Store(tmp_path / "file").entry(KEY, ABOUT))

    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "(Read-only file system)" in refused(lambda: Store(tmp_path / "home").entry(KEY, ABOUT))


def test_a_store_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    filled(tmp_path)
    connect = database._connect
    monkeypatch.setattr(database, "_connect", lambda path, mode: connect(path, "ro"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "utime", lambda path: os.close(-1))
    entry = Store(tmp_path).entry(KEY, ABOUT)
    assert right(entry.read(IDS)) and entry.missing(IDS) == set()
    message = refused(lambda: entry.write(ROWS))
    assert message.startswith(f"{entry.path}: attempt to write a readonly database.")


def test_a_full_disk(tmp_path, monkeypatch):
    entry = filled(tmp_path)
    pages = entry.path.stat().st_size // 4096
    connect = database._connect

    def full(path: Path, mode: str) -> sqlite3.Connection:
        db = connect(path, mode)
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    monkeypatch.setattr(database, "_connect", full)
    more = {bytes(31) + bytes([number]): np.zeros(900, np.float32) for number in range(50)}
    assert refused(lambda: entry.write(more)).startswith(f"{entry.path}: database or disk is full.")
    assert entry.missing(more) == set(more) and right(entry.read(IDS)) and len(entry.read(IDS)) == len(IDS)


def test_a_limit_on_the_size_of_files(tmp_path):
    entry = filled(tmp_path)
    more = {bytes(31) + bytes([number]): np.zeros(9000, np.float32) for number in range(50)}

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (entry.path.stat().st_size, resource.RLIM_INFINITY))
        refused(lambda: entry.write(more))
        refused(lambda: Store(tmp_path / "new").entry(KEY, ABOUT).write(more))

    assert status(in_child(write)) == 0
    assert len(entry.read(IDS)) == len(IDS) and entry.missing(more) == set(more)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    monkeypatch.setattr(store, "PATIENCE", 0.05)


def test_a_file_that_another_process_will_not_let_go(tmp_path, impatient):
    entry = filled(tmp_path)
    holder = sqlite3.connect(entry.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert refused(lambda: entry.read(IDS)).startswith(f"{entry.path}: database is locked.")
    holder.close()
    with FileLock(tmp_path / "store.lock"):
        for change in (
            lambda: entry.write(ROWS),
            lambda: Store(tmp_path).remove(entry.path),
            lambda: Store(tmp_path).set_aside(entry.path),
            lambda: Store(tmp_path).entry(OTHER_KEY, ABOUT),
        ):
            assert f"{tmp_path}: another process has been writing" in refused(change)
        assert right(entry.read(IDS)), "readers need not wait for the store"


def test_a_file_system_that_cannot_lock(tmp_path, monkeypatch):
    def no_locks(lock: FileLock) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    entry = filled(tmp_path)
    monkeypatch.setattr(FileLock, "_acquire", no_locks)
    assert refused(lambda: entry.write(ROWS)).startswith(f"{tmp_path}: No locks available.")


@pytest.mark.parametrize(
    "trouble",
    [
        "attempt to write a readonly database",
        "database is locked",
        "database or disk is full",
        "disk I/O error",
        "locking protocol",
        "unable to open database file",
    ],
)
def test_trouble_of_the_place_is_no_damage(tmp_path, monkeypatch, trouble):
    def troubled(*_: object) -> None:
        raise sqlite3.OperationalError(trouble)

    entry = filled(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(database, "read_rows", troubled)
    assert refused(lambda: entry.read(IDS)).startswith(f"{entry.path}: {trouble}.")
    assert entry.path.exists() and not list(tmp_path.glob("_*"))


def test_too_few_file_handles_are_no_damage(tmp_path):
    entry = filled(tmp_path)

    def read() -> None:
        in_use = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use[-1] + 1, in_use[-1] + 1))
        assert "Too many open files" in refused(lambda: entry.read(IDS))

    assert status(in_child(read)) == 0
    assert not list(tmp_path.glob("_*")) and len(entry.read(IDS)) == len(IDS)


def test_a_commit_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.undo()
    entry = filled(tmp_path)
    with database.opened(entry.path) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert db.execute("PRAGMA journal_mode").fetchone() == (b"delete",)


# ---- what it needs ------------------------------------------------------------------------------------------------


def test_no_file_stays_open(tmp_path):
    entry = filled(tmp_path)
    assert right(entry.read(IDS)) and entry.missing(IDS) == set()
    opened = [os.readlink(handle) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_the_store_needs_no_torch():
    code = (
        "import sys, types, pathlib\n"
        "import prefopt\n"
        "room = types.ModuleType('prefopt.reference')\n"  # the rest of the room has models
        "room.__path__ = [str(pathlib.Path(prefopt.__file__).parent / 'reference')]\n"
        "sys.modules[room.__name__] = room\n"
        "import prefopt.reference.upkeep\n"
        "print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
