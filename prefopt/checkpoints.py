"""Sealed checkpoints: which ones are whole, which one to resume from, which ones to delete.

`begin` makes the folder, with a manifest that says it is being written; the Trainer writes in place; `seal` then puts
every file on the disk and, last of all, the manifest with the length and SHA-256 of each. A checkpoint is whole if and
only if its manifest verifies, so a kill, a full disk or a damaged file at any moment leaves either the new checkpoint
whole or the one before it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
CUT_OFF = "its save was cut off"

_NAME = re.compile(r"checkpoint-([0-9]+)")
_TRASH = "_trash-"
# Transformers keeps this marker in the folder while it saves on SIGTERM, and takes it away after the seal.
_SAVING = "checkpoint-is-incomplete.txt"
# What a load takes from the folder by its name or by a pattern; a file of notes beside the weights does no harm.
_LOADED = re.compile(r"\.(safetensors|bin|pth?|distcp)$|\.index\.json$|(^|/)(adapter_config\.json|latest)$")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Manifest:
    step: int
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]  # length in bytes and SHA-256


def begin(folder: Path) -> None:
    """Make an empty folder for a checkpoint, marked as not whole yet; what had the name before goes.

    The mark tells a save that was cut off, which nobody misses, from a checkpoint whose manifest was lost. Call it
    from one process, before any rank writes into the folder.
    """
    _empty_trash(folder.parent)
    if folder.is_dir():
        discard(folder)
    folder.mkdir(parents=True)
    _put_manifest(folder, {"saving": True})


def seal(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Make the checkpoint of `step` whole: all its files are on the disk before the manifest takes its name.

    `facts` are JSON values that a resume compares with its own: settings, fingerprint of the data, world size.
    Call it when every rank has written its files, from one process. Raises `OSError` when the disk refuses.
    """
    files = _contents(folder)
    for path in (*files.values(), *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(path)
    body = {
        "version": VERSION,
        "step": step,
        "facts": dict(facts),
        "files": {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()},
    }
    _put_manifest(folder, body)
    _sync(folder.parent)


def problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole, with the file's name; None when every file has its sealed length and hash."""
    return _problem(folder, in_full=True)


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts a checkpoint was sealed with. Raises `UserError` when its manifest is missing or damaged."""
    try:
        return _read(folder).facts
    except (UserError, OSError) as error:
        raise UserError(f"{folder}: {error}; resume from another checkpoint") from error


def manifest_of_copy(folder: Path, changed: Mapping[str, bytes | None]) -> str:
    """The manifest of a copy in which some files hold other bytes, or (None) are left out; the rest is as sealed.

    Raises `UserError` when the checkpoint's own manifest is missing or damaged.
    """
    sealed = _read(folder)
    files = {name: {"bytes": length, "sha256": digest} for name, (length, digest) in sealed.files.items()}
    for name, content in changed.items():
        files.pop(name, None)
        if content is not None:
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _render({"version": VERSION, "step": sealed.step, "facts": sealed.facts, "files": files})


def newest_whole(output_dir: Path, judge: Callable[[Path], str | None] = problem) -> tuple[Path | None, dict[str, str]]:
    """The whole checkpoint of the highest step, and by name why each later one is not whole.

    `judge` may ask for more than that, as `problem` does: it gives the reason against a folder, or None.
    """
    skipped: dict[str, str] = {}
    for folder in reversed(checkpoints_in(output_dir)):
        reason = judge(folder)
        if reason is None:
            return folder, skipped
        skipped[folder.name] = reason
    return None, skipped


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-N`, and nothing after it, by step; whole or not."""
    steps = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps) if path.is_dir()]


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path], sealed: Path | None = None) -> list[Path]:
    """Delete checkpoints until `limit` are left, and return those deleted; None or 0 sets no limit.

    Those that are not whole go first, then the oldest. Never deleted: the newest that verifies in full, the ones in
    `keep`, and the one just `sealed`, which need not have the highest step after a resume from an earlier one, and
    is not read a second time. While none verifies, nothing is deleted. The others are judged by manifest and lengths.
    """
    _empty_trash(output_dir)
    folders = checkpoints_in(output_dir)
    if not limit or len(folders) <= limit:
        return []
    newest, _ = newest_whole(output_dir, lambda folder: _problem(folder, in_full=folder != sealed))
    if newest is None:
        return []
    protected = {newest.name, *(path.name for path in keep), *([sealed.name] if sealed else [])}
    candidates = [folder for folder in folders if folder.name not in protected]
    candidates.sort(key=lambda folder: _problem(folder, in_full=False) is None)  # stable: by step within each kind
    deleted = candidates[: len(folders) - limit]
    for folder in deleted:
        discard(folder)
    return deleted


def discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name at once, so that no tool takes a half-deleted folder for a checkpoint."""
    trash = folder.with_name(_TRASH + folder.name)
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)  # what is left goes at the next call


def disk_forecast(output_dir: Path, bytes_per_checkpoint: int, limit: int | None, saves: int | None = None) -> None:
    """Refuse a run whose checkpoints cannot fit on the disk. Raises `UserError` with the bytes needed and free.

    With a `limit`, one more than that many lie there at once, because the oldest goes only after the newest is sealed;
    those already there are counted as written. `saves` is the number of saves still to come, where it is known.
    """
    most = [max(1, limit + 1 - len(checkpoints_in(output_dir)))] if limit else []
    count = min(most + ([] if saves is None else [saves]), default=1)
    needed, output_dir = count * bytes_per_checkpoint, output_dir.absolute()
    free = shutil.disk_usage(next(path for path in (output_dir, *output_dir.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"{output_dir}: {count} more checkpoint{'s' * (count != 1)} of {_size(bytes_per_checkpoint)} each need "
            f"{_size(needed)}, and {_size(free)} are free; free some space, set a lower save_total_limit, save less "
            "often, or choose an output_dir on another disk"
        )


def _problem(folder: Path, *, in_full: bool) -> str | None:
    """As `problem`; without `in_full` the files are not read, so only what their lengths show is found."""
    try:
        sealed = _read(folder)
        found = _contents(folder)
        named = _NAME.fullmatch(folder.name)
        if named and int(named[1]) != sealed.step:
            return f"{MANIFEST} is that of step {sealed.step}"
        return next(_differences(sealed, found, in_full), None)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _differences(sealed: _Manifest, found: Mapping[str, Path], in_full: bool) -> Iterator[str]:
    """What is not as it was sealed; first what costs nothing to see, then, `in_full`, what only reading can show."""
    for name, (length, _) in sealed.files.items():
        actual = found[name].stat().st_size if name in found else None
        if actual is None:
            yield f"{name} is missing"
        elif actual != length:
            yield f"{name} is {'cut off' if actual < length else 'grown'} ({actual} bytes, sealed with {length})"
    for name in found:
        if name not in sealed.files and _LOADED.search(name):
            yield f"{name} was not there when it was sealed"
    for name, (_, digest) in sealed.files.items() if in_full else ():
        if _sha256(found[name]) != digest:
            yield f"{name} has changed since it was sealed"


def _read(folder: Path) -> _Manifest:
    """The manifest of a folder. Raises `UserError`, with the reason alone, when it is absent or cannot be used."""
    try:
        text = (folder / MANIFEST).read_bytes().decode("ascii")
        body = json.loads(text)
        del body["seal"]
        if text != _render(body):
            raise ValueError("its own hash does not fit")
        if "saving" in body:
            raise UserError(CUT_OFF)
        if body["version"] != VERSION:
            raise UserError(f"{MANIFEST} has version {body['version']}, and this prefopt reads version {VERSION}")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        return _Manifest(int(body["step"]), dict(body["facts"]), files)
    except FileNotFoundError as error:
        raise UserError("not sealed" if _contents(folder) else CUT_OFF) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{MANIFEST} is damaged") from error


def _put_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write a manifest under a temporary name, and give it its own in one step."""
    # The round trip turns every key into text, so that what is read later renders to the same letters.
    text = _render(json.loads(json.dumps(body, allow_nan=False)))
    temporary = folder / f"_{MANIFEST}"  # names with `_` in front are never pushed to the Hub
    with open(temporary, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)
    os.replace(temporary, folder / MANIFEST)
    _sync(folder)


def _render(body: Mapping[str, Any]) -> str:
    """The text of a manifest, with a hash of the rest in it: a changed letter anywhere shows."""
    own = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({**body, "seal": own}, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _contents(folder: Path) -> dict[str, Path]:
    """Every file that belongs to a checkpoint, by its name relative to the folder, in a fixed order.

    Only at the top are names with `_` in front temporary: shards of a distributed save are called `__0_0.distcp`.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept = [name for name in files if name not in (MANIFEST, _SAVING) and ("/" in name or name[0] != "_")]
    return {name: files[name] for name in sorted(kept)}


def _empty_trash(output_dir: Path) -> None:
    for path in output_dir.glob(f"{_TRASH}checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _size(number: int) -> str:
    return f"{number:,} bytes ({number / 1e9:.1f} GB)"
