"""`prefopt push`: send a run folder by hand, see beforehand what would be sent, and send again what did not arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from prefopt.errors import UserError
from prefopt.hub.files import RECIPE_FILE, Content, folder_files, left_behind, refuse_secrets, remarks, size
from prefopt.hub.pushes import note, read_record, told
from prefopt.hub.sending import Destination, send, why

_LISTED = 12  # names in one line


def push_folder(
    folder: Path,
    repo: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> None:
    """Print what is sent of a run folder, an adapter or a checkpoint, and send it unless `dry_run`.

    Where nothing is said, the folder goes where its run pushed it, or else to a repository of its own name. Raises
    `UserError` when there is nothing to send or it did not arrive.
    """
    name = folder.resolve().name
    run = folder.resolve().parent if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else folder
    settings = _settings(run)
    destination = Destination(
        repo or settings.get("hub_model_id") or run.resolve().name,
        private or settings.get("hub_private_repo"),
        revision or settings.get("hub_revision"),
    )
    strategy = str(settings.get("hub_strategy") or HubStrategy.END.value)
    files = folder_files(folder, strategy)
    refuse_secrets(files)
    print(*_listing(folder, files, destination), sep="\n", flush=True)
    if dry_run:
        print("Nothing was sent.")
        return
    try:
        sent = send(files, destination, f"Push of {name}")
    except Exception as error:
        raise UserError(f"{destination.repo}: {why(error, destination)}. The same command sends the rest.") from error
    note(run, destination, strategy, f"Push of {name}", sent)
    print(f"Sent: {told(sent)}: {sent.commit_url}")


def _settings(folder: Path) -> dict[str, Any]:
    """Where the folder was pushed, or, while it was not, where its recipe wants it."""
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        recipe = None
    return {**(recipe if isinstance(recipe, dict) else {}), **read_record(folder)}


def _listing(folder: Path, files: Mapping[str, Content], destination: Destination) -> list[str]:
    total = sum(map(size, files.values()))
    branch = f", branch {destination.revision}" if destination.revision else ""
    where = f"{destination.repo}{branch}{' (private)' if destination.private else ''}"
    staying = left_behind(folder, files)
    return [
        f"To {where}: {len(files)} files, {total:,} bytes",
        *(f"{size(content):>15,}  {name}" for name, content in sorted(files.items())),
        *([f"Stays here: {_some(staying)}"] if staying else []),
        *(f"Note: {remark}" for remark in remarks(files)),
    ]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
