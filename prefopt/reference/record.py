"""`reference.json` in a run folder: which function its reference is, so that a resumed run cannot take another one."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.reference.hashing import hash_json, plain
from prefopt.reference.identity import Identity
from prefopt.report.results import write_whole

RECORD = "reference.json"
VERSION = 1

_shown = reprlib.Repr()
_shown.maxstring = 120


def record_reference(folder: Path, identity: Identity, source: str, moves: Mapping[str, Any] | None = None) -> None:
    """Write the reference that a run begins with into its folder. Call it from one process.

    `source` is a line for people; `moves` are `sync_steps` and `mixup_alpha` of a reference that follows the policy.
    """
    body = plain(
        {
            "version": VERSION,
            "key": identity.key,
            "weights": identity.weights,
            "source": source,
            **({"moves": moves} if moves else {}),
            "about": identity.about,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**body, "seal": hash_json(body)}, indent=1, sort_keys=True) + "\n"
    write_whole(folder / RECORD, text)


def check_reference(folder: Path, identity: Identity) -> None:
    """Refuse to go on with a reference that is not the one of the run. Without a record there is nothing to refuse.

    Raises `UserError` that says what differs, or that the record is damaged. Call it from one process.
    """
    path = folder / RECORD
    if not path.exists():
        return
    recorded = _read(path)
    if recorded["key"] != identity.key:
        differences = "; ".join(_differences(recorded["about"], plain(identity.about)))
        raise UserError(
            f"{path}: this run began with another reference. Not the same: {differences}. Start from the model that it "
            "began with, name that model as `reference.model`, or choose another output_dir"
        )


def recorded_weights(folder: Path) -> str | None:
    """The SHA-256 of the weights of a run's reference; None without a record. Raises `UserError` for a damaged one."""
    path = folder / RECORD
    return str(_read(path)["weights"]) if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        seal = body.pop("seal")
        whole = bool(seal == hash_json(body))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} is damaged, so it cannot be told which reference this run began with. If you know that it is the "
            "one of now, delete the file; else choose another output_dir"
        )
    if body["version"] != VERSION:
        raise UserError(f"{path} has version {body['version']}, and this prefopt reads version {VERSION}")
    return dict(body)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the key that are not the same, with what is known of each."""
    details = {
        "weights": [],
        "adapter": _adapter_changes(before["adapter"], now["adapter"]),
        "configuration": _changes(before["configuration"], now["configuration"]),
        "precision": _changes(before["parts"]["precision"], now["parts"]["precision"]),
        "code": _changes({"class": before["class"]}, {"class": now["class"]}),
    }
    for part, changes in details.items():
        if before["parts"][part] != now["parts"][part]:
            known = ", ".join(changes)
            yield f"{part} ({known})" if known else part


def _adapter_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    """What is not the same in two adapters, whatever they are called."""
    if not before or not now:
        yield f"{'one' if before else 'none'} then, {'one' if now else 'none'} now"
        return
    first, second = next(iter(before.values())), next(iter(now.values()))
    yield from (name for name in ("weights", "scaling") if first[name] != second[name])
    yield from _changes(first["configuration"], second["configuration"])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The fields that are not the same, each with both its values."""
    for name in sorted(before.keys() | now.keys()):
        first, second = before.get(name), now.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from (f"{name}.{change}" for change in _changes(first, second))
        elif first != second:
            yield f"{name}: {_shown.repr(first)} then, {_shown.repr(second)} now"
