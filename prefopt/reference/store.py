"""The store of reference scores: rows of floats addressed by their content, in one SQLite file for each function.

What a file holds is decided by its key, the hash of a reference model as a function; what a row holds by its id, the
hash of token ids and scored positions. So a row is right for every run that asks for it, or it is not there.

A damaged row is removed and a damaged file set aside; both are said, and what is missing is computed again. A process
may be killed at any moment: what it had written is there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from prefopt.errors import UserError
from prefopt.reference import database
from prefopt.reference.database import PATIENCE, REMEDY, DamagedError, Header
from prefopt.reference.lease import Lease
from prefopt.reference.rows import encode

DAMAGED = "_damaged-"

_NEW = "_new.sqlite"
_NAME = re.compile(r"([a-z_]+)-([0-9a-f]{32})\.sqlite")
_KEY = re.compile(r"[0-9a-f]{32,}")

T = TypeVar("T")


def default_folder() -> Path:
    """$PREFOPT_STORE, else the user's cache folder: $XDG_CACHE_HOME/prefopt/reference or ~/.cache/prefopt/reference."""
    if place := os.environ.get("PREFOPT_STORE"):
        return Path(place).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefopt" / "reference"
    except RuntimeError as error:
        raise UserError(f"the store of reference scores has no place, for there is no home folder. {REMEDY}") from error


@dataclass(frozen=True)
class EntryInfo:
    """What there is to know of one file without reading its rows."""

    path: Path
    kind: str
    key: str  # its first 32 characters alone where the file is damaged
    rows: int
    bytes: int
    created: float | None  # seconds since 1970
    used: float
    about: dict[str, Any]
    damaged: str | None  # why the file cannot be used


class Store:
    """A folder of entries. `tell` takes the lines about damage; without it they go to the log.

    Everything that writes to a file of the store, or changes what a name in it stands for, runs under one lock. SQLite
    alone orders those who use one file, but not those who replace it: a journal would come to lie beside a file that it
    does not belong to.
    """

    def __init__(self, folder: str | Path | None = None, tell: Callable[[str], None] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self.tell = _say if tell is None else tell

    def entry(self, key: str, about: Mapping[str, Any], kind: str = "logp") -> Entry:
        """The entry of a function, made where there is none. `about` (JSON values) is then written beside the key.

        `key` is a hash in hexadecimal digits. Raises `UserError` when the folder cannot be used.
        """
        entry = Entry(self, key, about, kind)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: the folder cannot be made ({error.strerror}). {REMEDY}") from error
        entry.open()
        return entry

    def entries(self) -> list[EntryInfo]:
        """Every entry, the one used longest ago first. Nothing is changed, whatever is found."""
        found = []
        for path in self.folder.glob("*.sqlite"):
            if match := _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):  # deleted since
                    found.append(_info(path, *match.groups()))
        return sorted(found, key=lambda info: info.used)

    def bytes(self) -> int:
        """What the store occupies on the disk."""
        total = 0
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def leftovers(self) -> list[Path]:
        """Damaged files that were set aside, and what a killed process left of a file it was making."""
        return sorted([*self.folder.glob(f"{DAMAGED}*"), *self.folder.glob(f"{_NEW}*")])

    def remove(self, path: Path) -> None:
        """Delete a file of the store. Who reads it at this moment comes to the end of it."""
        with self.lock():
            database.delete(path)
            lease_of(path).path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> Path:
        """Give a damaged file a name under which it is not used, and return that; the one before it goes."""
        with self.lock():
            return _put_aside(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store against all who write to it. Raises `UserError` when that, or the body's work, cannot be."""
        try:
            # It would fall back on a file that a killed process leaves behind.
            with FileLock(self.folder / "store.lock", timeout=PATIENCE, fallback_to_soft=False):
                yield
        except Timeout as error:
            raise UserError(
                f"{self.folder}: another process has been writing for {PATIENCE:.0f} s. {REMEDY}"
            ) from error
        except OSError as error:
            raise UserError(f"{error.filename or self.folder}: {error.strerror or error}. {REMEDY}") from error


class Entry:
    """The rows of one function, in one file. No file stays open between two calls.

    Any number of processes may read and write at once, with a lease or without one.
    """

    def __init__(self, store: Store, key: str, about: Mapping[str, Any], kind: str) -> None:
        self.path = entry_path(store.folder, key, kind)
        self._store, self._kind, self._key, self._about = store, kind, key, dict(about)
        self._lease = lease_of(self.path)

    def open(self) -> None:
        """Make the file where there is none, replace it where it is damaged, and note that it was used."""
        self._work(lambda db: None)
        with suppress(OSError):  # a store that can only be read
            os.utime(self.path)

    def read(self, ids: Collection[bytes]) -> dict[bytes, np.ndarray]:
        """The rows that are there and verify. Damaged ones are removed, which is said, and are not among them."""
        found, damaged = self._work(lambda db: database.read_rows(db, self._key, ids))
        self._remove(damaged)
        return found

    def write(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Keep rows: all of them, on the disk, when this returns, or none when it raises.

        Floats, bfloat16 as the unsigned integers of its bits, or int32; any shape. Raises `ValueError` for values that
        are not finite, and `UserError` when the file cannot be written.
        """
        encoded = [encode(self._key, id, values) for id, values in sorted(rows.items())]
        if encoded:
            self._work(lambda db: database.insert(db, encoded), writing=True)

    def missing(self, ids: Collection[bytes]) -> set[bytes]:
        """Those of the ids that have no row. Cheap: a damaged row is found only when it is read."""
        return set(ids) - self._work(lambda db: database.present(db, ids))

    def verify(self) -> None:
        """Read every row and check it, and the file around them; what is damaged goes as it does in `read`."""
        self._remove(self._work(lambda db: database.damaged_rows(db, self._key)))

    def lease(self) -> Lease | None:
        """The right to compute what is missing; None, at once, while another living process has it."""
        if not self._lease.take():
            return None
        with suppress(UserError):
            self._work(lambda db: database.note_lease(db, time.time()), writing=True)
        return self._lease

    def holder(self) -> str | None:
        """Who has the lease, for a message: `process 123 on host, since 14:02:31`."""
        holder, since = self._lease.holder(), None
        if holder is None:
            return None
        with suppress(UserError):
            since = self._work(database.leased_since)
        return holder + (f", since {time.strftime('%H:%M:%S', time.localtime(since))}" if since else "")

    def close(self) -> None:
        """Give back the lease, if it is held."""
        self._lease.release()

    def _work(self, work: Callable[[Connection], T], *, writing: bool = False) -> T:
        """Do something with the file; where it is missing or damaged, make a new one and do it again."""
        if not writing:
            # A file that is just being replaced can be missing for a moment; under the lock an error is one.
            with suppress(DamagedError, UserError):
                return self._try(work)
        # From here on nobody else can mend the file, so what is damaged now is damaged still when it is replaced.
        with self._store.lock():
            try:
                return self._try(work)
            except DamagedError as error:
                self._replace(str(error))
            try:
                return self._try(work)
            except DamagedError as error:
                raise UserError(f"{self.path}: a new file is damaged at once ({error}). {REMEDY}") from error

    def _try(self, work: Callable[[Connection], T]) -> T:
        with database.opened(self.path) as db:
            header = database.read_header(db)
            if (header.kind, header.key) != (self._kind, self._key):
                raise DamagedError("it is the file of another entry")
            return work(db)

    def _replace(self, reason: str) -> None:
        """Put a new file where there is none, or in place of a damaged one, with the rows of it that can be read."""
        new, damaged = self._store.folder / _NEW, self.path.exists()
        database.delete(new)
        rows = database.readable_rows(self.path, self._key) if damaged else ()
        kept = database.create(new, Header(self._kind, self._key, self._about, time.time()), rows)
        aside = _put_aside(self.path) if damaged else None
        database.move(new, self.path)
        if aside:
            self._store.tell(
                f"reference store: {self.path} is damaged ({reason}). It is kept as {aside.name}; {kept:,} rows could "
                "be taken over from it, and what is missing is computed again"
            )

    def _remove(self, numbers: Collection[int]) -> None:
        if not numbers:
            return
        removed = self._work(lambda db: database.remove_damaged(db, self._key, numbers), writing=True)
        if removed:
            self._store.tell(
                f"reference store: {self.path}: {removed:,} damaged row{'s' * (removed != 1)} removed, to be computed "
                "again when needed"
            )


def entry_path(folder: Path, key: str, kind: str) -> Path:
    """The file of an entry. Raises `ValueError` for what is no key or kind."""
    name = f"{kind}-{key[:32]}.sqlite"
    if not _KEY.fullmatch(key) or not _NAME.fullmatch(name):
        raise ValueError(f"an entry has a kind in small letters and a hash as its key, not {kind} and {key}")
    return folder / name


def lease_of(path: Path) -> Lease:
    """The lease of an entry's file."""
    return Lease(path.with_suffix(".lease"))


def _info(path: Path, kind: str, key: str) -> EntryInfo:
    state = path.stat()
    known: dict[str, Any] = {"path": path, "kind": kind, "bytes": state.st_size, "used": state.st_mtime}
    try:
        with database.opened(path) as db:
            header = database.read_header(db)
            if header.kind != kind or not header.key.startswith(key):
                raise DamagedError("it is the file of another entry")
            rows = database.count(db)
        return EntryInfo(**known, key=header.key, rows=rows, created=header.created, about=header.about, damaged=None)
    except DamagedError as error:
        return EntryInfo(**known, key=key, rows=0, created=None, about={}, damaged=str(error))


def _put_aside(path: Path) -> Path:
    aside = path.with_name(DAMAGED + path.name)
    database.move(path, aside)
    return aside


def _say(line: str) -> None:
    from prefopt.console import say  # brings torch, and the command line's lists need none

    say(line)
