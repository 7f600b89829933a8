"""Runs the stages of a plan in order; what is finished is not done again, what was cut off goes on.

A stage's folder holds `stage.json`: the hash of everything the stage depends on, and, written last, that it is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from prefopt.console import say
from prefopt.errors import UserError
from prefopt.procedures.stage import MakeStage, Stage
from prefopt.report.results import write_whole

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

MARK = "stage.json"
FULL = 2**20  # bytes free
WEIGHTS = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")


def run_plan(stages: Sequence[Stage]) -> Any:
    """Run what is missing of a plan and return what its last stage returned (None if that was done before).

    Raises `UserError` when a folder holds a stage made with other settings.
    """
    result, inputs = None, ""
    for number, stage in enumerate(stages, start=1):
        inputs = stage_hash(stage, inputs)
        title = f"[{number}/{len(stages)}] {stage.name}" if len(stages) > 1 else stage.name
        if _status(stage.folder, stage.name, inputs) == "done":
            say(f"{title}: done before, in {stage.folder}")
            continue
        say(f"{title}: {stage.folder}")
        _mark(stage.folder, stage.name, inputs, "started")
        with _disk_of(stage.folder):
            result = _run(stage)
        _mark(stage.folder, stage.name, inputs, "done")
    return result


def stage_hash(stage: Stage, before: str) -> str:
    """SHA-256 over the stage's settings, its local data files, and the hash of the stage before it."""
    digest = hashlib.sha256(before.encode())
    if isinstance(stage, MakeStage):
        digest.update(json.dumps([stage.name, stage.settings], sort_keys=True).encode())
        return digest.hexdigest()
    settings = stage.recipe.resolved()
    # These decide how the work is reported, not what comes out.
    for name in ("output_dir", "logging_steps", "report_to", "disable_tqdm", "resume_from_checkpoint"):
        settings.pop(name, None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in (*stage.recipe.data.local_files(), *_loss_files(stage.recipe)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _loss_files(recipe: Recipe) -> list[Path]:
    """The files of losses from outside the package: another formula under the same name is another run."""
    modules = {type(loss).__module__ for loss in recipe.objective().losses}
    outside = sorted(name for name in modules if not name.startswith("prefopt."))
    return [Path(str(sys.modules[name].__file__)) for name in outside if getattr(sys.modules[name], "__file__", None)]


@contextmanager
def _disk_of(folder: Path) -> Iterator[None]:
    """A full disk as a `UserError`; not everyone who writes weights says why a write failed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if "No space left" not in str(error) and shutil.disk_usage(folder).free >= FULL:
            raise
        raise UserError(f"{folder}: the disk is full. Make room, and give the same command again to go on.") from error


def _run(stage: Stage) -> Any:
    if isinstance(stage, MakeStage):
        result = [stage.make() if PartialState().is_main_process else None]
        return broadcast_object_list(result)[0]
    from prefopt.procedures.train import train

    return train(stage.recipe)


def _status(folder: Path, name: str, inputs: str) -> str:
    """`new`, `started` or `done`, as the main process sees it. Raises `UserError` for a folder that is taken."""
    status = [_read_status(folder, name, inputs) if PartialState().is_main_process else None]
    found = broadcast_object_list(status)[0]
    if found == "foreign":
        raise UserError(f"{folder}: holds a model that this run did not make. Choose another output_dir.")
    if found == "other":
        raise UserError(
            f"{folder}: holds a run with another recipe or other data. Choose another output_dir, or delete the folder."
        )
    return str(found)


def _read_status(folder: Path, name: str, inputs: str) -> str:
    try:
        mark = json.loads((folder / MARK).read_text())[name]
    except (OSError, ValueError, KeyError):
        # Weights without our mark must be neither written over nor taken for the start of this run.
        return "foreign" if _holds_weights(folder) else "new"
    if mark["inputs"] == inputs:
        return str(mark["status"])
    # A run that stopped before its first checkpoint, as one with a bad row does, leaves nothing to protect.
    return "new" if mark["status"] == "started" and not _holds_weights(folder) else "other"


def _holds_weights(folder: Path) -> bool:
    return any(True for pattern in WEIGHTS for _ in folder.glob(pattern))


def _mark(folder: Path, name: str, inputs: str, status: str) -> None:
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / MARK
            marks = json.loads(path.read_text()) if path.is_file() else {}
            marks[name] = {"status": status, "inputs": inputs}
            write_whole(path, json.dumps(marks, indent=2))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}. Choose another output_dir.") from error
    state.wait_for_everyone()
