"""One SQLite file of the store: how it is made, opened and read, and what its errors mean.

Synchronous FULL: a commit that has returned survives a power cut with the file whole. The rollback journal, and not the
write-ahead log: that log needs memory shared by all who have the file open, which a network file system has not got,
and it leaves data in a second file while a process lives.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.errors import UserError
from prefopt.reference.rows import Row, decode

VERSION = 2
# Seconds that one process waits for another's transaction.
PATIENCE = 60.0
REMEDY = (
    "Give the store a folder with room on a local disk (reference: {store: DIR}), or score beside the policy "
    "(reference: {source: live})"
)

_SCHEMA = (
    f"PRAGMA user_version = {VERSION}",
    "CREATE TABLE header (text BLOB NOT NULL, checksum BLOB NOT NULL, leased REAL)",
    "CREATE TABLE rows (id BLOB NOT NULL UNIQUE, form BLOB NOT NULL, data BLOB NOT NULL, checksum BLOB NOT NULL)",
)
_COLUMNS = "id, form, data, checksum"
# SQLite before 3.32 takes at most 999 variables in a statement.
_VARIABLES = 900
# What SQLite says when the place is to blame, and not the content of the file.
_PLACE = {
    "access permission denied",
    "attempt to write a readonly database",
    "database is locked",
    "database or disk is full",
    "database table is locked",
    "disk I/O error",
    "locking protocol",
    "unable to open database file",
}


class DamagedError(Exception):
    """A file does not hold what was written into it; the message says what is wrong."""


@dataclass(frozen=True)
class Header:
    """What a file is for. `about` is for people: the model's name, dtype, kernel, versions."""

    kind: str
    key: str
    about: dict[str, Any]
    created: float  # seconds since 1970


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an existing file. Its errors leave as `DamagedError`, or as `UserError` with a remedy."""
    with errors_of(path):
        if path.stat().st_size == 0:
            raise DamagedError("it is empty")
        with closing(_connect(path, "rw")) as db:
            yield db


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Errors of the work with a file leave as `DamagedError`, or as `UserError` with a remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError("it is gone") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. {REMEDY}") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.ProgrammingError):  # a mistake of ours, and no reason to give up a file
            raise
        raise _meaning(error, path) from error
    except UnicodeDecodeError as error:  # SQLite quotes what it cannot read
        raise DamagedError("its schema is damaged") from error


def reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads, to be kept for many reads. Raises as `opened` does."""
    with errors_of(path):
        path.stat()
        db = _connect(path, "ro")
        read_header(db)
        return db


def create(path: Path, header: Header, rows: Iterable[Row] = ()) -> int:
    """Write a new file with these rows, and say how many. Raises `UserError` when the disk refuses."""
    text = json.dumps(vars(header), sort_keys=True).encode()
    try:
        with closing(_connect(path, "rwc")) as db:
            with transaction(db):
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute("INSERT INTO header VALUES (?, ?, NULL)", (text, _digest(text)))
                db.executemany(f"INSERT OR IGNORE INTO rows ({_COLUMNS}) VALUES (?, ?, ?, ?)", rows)
            return count(db)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path}: {error}. {REMEDY}") from error


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the body, or nothing."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def read_header(db: sqlite3.Connection) -> Header:
    """The header of a file. Raises `DamagedError` when it is not one of ours, of this version, and whole."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise DamagedError(f"it has version {version}, and this prefopt reads version {VERSION}")
    found = db.execute("SELECT text, checksum FROM header").fetchall()
    if len(found) != 1 or not isinstance(found[0][0], bytes) or _digest(found[0][0]) != found[0][1]:
        raise DamagedError("its header is damaged")
    return Header(**json.loads(found[0][0]))


def count(db: sqlite3.Connection) -> int:
    """How many rows there are."""
    return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])


def note_lease(db: sqlite3.Connection, since: float) -> None:
    """Write beside the header when the lease was taken, for those who wait."""
    db.execute("UPDATE header SET leased = ?", (since,))


def leased_since(db: sqlite3.Connection) -> float | None:
    """When the lease was last taken, in seconds since 1970."""
    (since,) = db.execute("SELECT leased FROM header").fetchone()
    return since if isinstance(since, float) else None


def insert(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write rows, over those with the same ids: what is there may be damaged."""
    with transaction(db):
        db.executemany(f"INSERT OR REPLACE INTO rows ({_COLUMNS}) VALUES (?, ?, ?, ?)", rows)


def present(db: sqlite3.Connection, ids: Collection[bytes]) -> set[bytes]:
    """Those of the ids that have a row, whole or not."""
    return {id for (id,) in _select(db, "SELECT id FROM rows WHERE id IN", ids)}


def read_rows(db: sqlite3.Connection, key: str, ids: Collection[bytes]) -> tuple[dict[bytes, np.ndarray], list[int]]:
    """The values of rows that verify, and the row numbers of those that do not."""
    found: dict[bytes, np.ndarray] = {}
    damaged: list[int] = []
    for number, *row in _select(db, f"SELECT rowid, {_COLUMNS} FROM rows WHERE id IN", ids):
        values = decode(key, *row)
        if values is None:
            damaged.append(number)
        else:
            found[row[0]] = values
    return found, damaged


def damaged_rows(db: sqlite3.Connection, key: str) -> list[int]:
    """The row numbers of all rows that do not verify. Raises `DamagedError` when the file around them is damaged."""
    rows = db.execute(f"SELECT rowid, {_COLUMNS} FROM rows")
    damaged = [number for number, *row in rows if decode(key, *row) is None]
    (problem,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != b"ok":
        raise DamagedError(problem.decode(errors="replace").splitlines()[-1])
    return damaged


def remove_damaged(db: sqlite3.Connection, key: str, numbers: Collection[int]) -> int:
    """Delete those of the rows that still do not verify, and say how many: another process may have been there."""
    with transaction(db):
        rows = list(_select(db, f"SELECT rowid, {_COLUMNS} FROM rows WHERE rowid IN", numbers))
        damaged = [(number,) for number, *row in rows if decode(key, *row) is None]
        db.executemany("DELETE FROM rows WHERE rowid = ?", damaged)
    return len(damaged)


def readable_rows(path: Path, key: str) -> Iterator[Row]:
    """What can still be read of a damaged file, from both ends up to the damage; every row proves itself."""
    for order in ("ASC", "DESC"):
        try:
            with opened(path) as db:
                for row in db.execute(f"SELECT {_COLUMNS} FROM rows ORDER BY rowid {order}"):
                    if decode(key, *row) is not None:
                        yield row
            return
        except (DamagedError, UserError):
            continue


def move(path: Path, target: Path) -> None:
    """Give a file another name, in place of what has that, and put the names on the disk where the file system can."""
    delete(target)
    os.replace(path, target)
    delete(path)
    with suppress(OSError):
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def delete(path: Path) -> None:
    """Delete a file, or what has its name, and its journal: that would be played back into the next of this name."""
    for found in (path, path.with_name(f"{path.name}-journal")):
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _select(db: sqlite3.Connection, query: str, values: Collection[Any]) -> Iterator[tuple[Any, ...]]:
    # In order of value, so that neighbours in the index are read together.
    rest = iter(sorted(values))
    while part := list(islice(rest, _VARIABLES)):
        yield from db.execute(f"{query} ({','.join('?' * len(part))})", part)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
    db.text_factory = bytes  # a flipped bit makes a text of what was bytes, and it need not be UTF-8
    db.execute("PRAGMA synchronous = FULL")
    return db


def _meaning(error: sqlite3.Error, path: Path) -> Exception:
    """Whether the file is damaged or its place unfit: the one is computed again, the other only a user can mend."""
    if path.exists() and not path.is_file():
        return DamagedError("something else has its name")
    if path.exists() and not os.access(path, os.R_OK):
        return DamagedError("it cannot be read")
    # One byte of the header makes SQLite take a file for read-only.
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    if str(error) not in _PLACE or ("readonly" in str(error) and writable):
        return DamagedError(str(error))
    return UserError(f"{path}: {error}. {REMEDY}")


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()
