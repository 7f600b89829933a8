"""A small store with known rows, processes that work on it, and a look at what they left."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prefopt.reference import database
from prefopt.reference.store import Entry, Store

KEY = hashlib.sha256(b"a reference").hexdigest()
OTHER_KEY = hashlib.sha256(b"another reference").hexdigest()
ABOUT = {"name": "tiny", "dtype": "float32"}
IDS = [hashlib.sha256(b"%d" % number).digest() for number in range(120)]
KILLED = -signal.SIGKILL


def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite not wait for the disk, which only a power cut would show."""
    connect = database._connect

    def hasty(path: Path, mode: str) -> sqlite3.Connection:
        db = connect(path, mode)
        db.execute("PRAGMA synchronous = OFF")
        return db

    monkeypatch.setattr(database, "_connect", hasty)


def row(id: bytes, of: str = KEY) -> np.ndarray:
    """The scores of an id: always the same, and of no other id or key."""
    seed = int.from_bytes(hashlib.sha256(id + of.encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    return generator.standard_normal(40 + seed % 30).astype(np.float32)


ROWS = {id: row(id) for id in IDS}


def filled(folder: Path, told: list[str] | None = None, of: str = KEY) -> Entry:
    """An entry with a row for each of `IDS`; lines about damage go to `told`."""
    entry = Store(folder, tell=[].append if told is None else told.append).entry(of, ABOUT)
    entry.write({id: row(id, of) for id in IDS})
    return entry


def right(found: dict[bytes, np.ndarray], of: str = KEY) -> bool:
    """Whether every row found is what was written for its id, bit for bit."""
    return all(np.array_equal(values, row(id, of)) and values.dtype == np.float32 for id, values in found.items())


def in_child(action: Callable[[], object]) -> int:
    """Run an action in a process of its own, without waiting for it; its number. An exception ends it with 1."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(300)  # whatever becomes of the test
        action()
        os._exit(0)
    finally:
        os._exit(1)


def status(child: int) -> int:
    """Wait for a process; 0 when its action came to its end."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> None:
    """End a process without any clean-up, and see it gone."""
    os.kill(child, signal.SIGKILL)
    assert status(child) == KILLED


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something holds; the limit is far beyond what it takes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
