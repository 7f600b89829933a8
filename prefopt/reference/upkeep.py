"""What `prefopt cache` does to a store of reference scores: lists it, checks it, makes room in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.reference.store import Entry, EntryInfo, Store, lease_of

_DAY = 86_400.0
_GB = 1e9


@dataclass(frozen=True)
class Collected:
    """What `gc` deleted, with its bytes, and what it left because a living process computes for it."""

    removed: list[tuple[Path, int]] = field(default_factory=list)
    in_use: list[Path] = field(default_factory=list)


def table(entries: Sequence[EntryInfo]) -> list[str]:
    """The entries of a store as lines of text, under a line that names the columns."""
    lines = [("key", "model", "kind", "rows", "size", "created", "last used")]
    lines += [
        (
            entry.key[:12],
            f"damaged: {entry.damaged}"
            if entry.damaged
            else str(entry.about.get("name") or entry.about.get("class", "")),
            entry.kind,
            f"{entry.rows:,}",
            size(entry.bytes),
            _day(entry.created),
            _day(entry.used),
        )
        for entry in entries
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def verify(folder: str | Path | None = None) -> list[str]:
    """Read and check every row of a store. Damaged rows are removed and damaged files set aside: a line for each."""
    told: list[str] = []
    store = Store(folder, tell=told.append)
    for entry in store.entries():
        if entry.damaged:
            aside = store.set_aside(entry.path)
            told.append(f"reference store: {entry.path} is damaged ({entry.damaged}). It is kept as {aside.name}")
        else:
            Entry(store, entry.key, entry.about, entry.kind).verify()
    return told


def gc(
    store: Store, *, max_gb: float | None = None, older_than: float | None = None, dry_run: bool = False
) -> Collected:
    """Delete what is damaged, entries not used for `older_than` days, and then, until the store has at most `max_gb`,
    those used longest ago. Entries for which a process computes stay. `dry_run` only says what would go.
    """
    done = Collected([(path, _bytes(path)) for path in store.leftovers()])
    left = store.bytes() - sum(size for _, size in done.removed)
    for entry in store.entries():
        unused = older_than is not None and entry.used < time.time() - older_than * _DAY
        if not (unused or entry.damaged) and (max_gb is None or left <= max_gb * _GB):
            continue
        if lease_of(entry.path).is_held():
            done.in_use.append(entry.path)
            continue
        done.removed.append((entry.path, entry.bytes))
        left -= entry.bytes
    for path, _ in [] if dry_run else done.removed:
        store.remove(path)
    return done


def size(number: int) -> str:
    """Bytes as people read them."""
    return f"{number / 1e6:,.1f} MB" if number < _GB else f"{number / _GB:,.1f} GB"


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _day(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
