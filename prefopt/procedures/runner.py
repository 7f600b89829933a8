"""Runs the stages of a plan in order; what is finished is not done again, what was cut off goes on.

A stage's folder holds `stage.json`: everything the stage depends on, by name, and, written last, that it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.checkpoints import checkpoints_in
from prefopt.console import say
from prefopt.drift import Difference, check_names, differences, digest, refuse_drift
from prefopt.errors import UserError
from prefopt.hub.pushes import wait_for_pushes
from prefopt.procedures.inputs import inputs_of
from prefopt.procedures.stage import MakeStage, Stage
from prefopt.ranks import on_main
from prefopt.report.results import write_whole
from prefopt.resuming import holds_weights, refuse_early
from prefopt.saving import full_disk_said

MARK = "stage.json"
# A finished run goes on when these were changed: all that was done is still part of it.
HORIZON = ("num_train_epochs", "max_steps")
_PLACE = "the run folder"


@dataclass(frozen=True)
class _Mark:
    """What a stage is or was made from, and how far it is: `started` or `done`."""

    facts: dict[str, Any]
    before: str  # hash of the stage before it
    status: str = "started"

    @property
    def inputs(self) -> str:
        return digest({**self.facts, "before": self.before})


def run_plan(stages: Sequence[Stage]) -> Any:
    """Run what is missing of a plan and return what its last stage returned (None if that was done before).

    Raises `UserError` when a folder holds a stage made with other settings, unless `allow_change` names them.
    """
    result, before = None, ""
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}" if len(stages) > 1 else stage.name
        mark, changes = _enter(stage, before)
        before = mark.inputs
        if mark.status == "done":
            say(f"{title}: done before, in {stage.folder}")
            continue
        say(f"{title}: {stage.folder}", *(f"{title}: changed: {change.text(_PLACE)}" for change in changes))
        _write_mark(stage, mark)
        with full_disk_said(stage.folder):
            result = _run(stage)
        _write_mark(stage, _Mark(mark.facts, mark.before, "done"))
    wait_for_pushes()
    return result


def _enter(stage: Stage, before: str) -> tuple[_Mark, list[Difference]]:
    """As `_look`, on every rank, with what the stage's recipe says of going on."""
    if isinstance(stage, MakeStage):
        return on_main(lambda: _look(stage, before))
    args = stage.recipe.training_arguments()
    refuse_early(args.resume, str(stage.folder))
    return on_main(lambda: _look(stage, before, args.allow_change or []))


def _look(stage: Stage, before: str, allowed: Iterable[str] | None = None) -> tuple[_Mark, list[Difference]]:
    """What a stage is made from, with `done` where it is; and the changes that are allowed. On the main process.

    `allowed` is None for a stage that is made anew or not at all.
    """
    now = _Mark(inputs_of(stage), before)
    check_names(allowed, now.facts)
    was, taken = _read_mark(stage), holds_weights(stage.folder)
    if was is None:
        # Weights without our mark must be neither written over nor taken for the start of this run.
        if taken:
            raise UserError(f"{stage.folder}: holds a model that this run did not make. Choose another output_dir")
        return now, []
    if was.inputs == now.inputs:
        return replace(now, status=was.status), []
    if was.status != "done" and not taken:
        return now, []  # stopped before its first checkpoint, as with a bad row: nothing to protect
    found = differences(was.facts, now.facts)
    if was.status == "done":
        _refuse_late(stage, found)
    refuse_drift(found, allowed, stage.folder, _PLACE)
    if was.before != before:
        raise UserError(
            f"{stage.folder}: was made from what an earlier stage of the plan left, which has changed since. Choose "
            "another output_dir, or delete the folder"
        )
    return now, found


def _refuse_late(stage: Stage, found: Sequence[Difference]) -> None:
    """Refuse changes to a finished run, but for those that let it go on."""
    late = [f"\n  {difference.text(_PLACE)}" for difference in found if not difference.is_named(HORIZON)]
    if late:
        raise UserError(
            f"{stage.folder}: holds a finished run with other settings:{''.join(late)}\n"
            "Choose another output_dir, or delete the folder"
        )
    if found and not checkpoints_in(stage.folder):
        raise UserError(
            f"{stage.folder}: this run is finished, and no checkpoint is left to go on from. Choose another output_dir"
        )


def _run(stage: Stage) -> Any:
    if isinstance(stage, MakeStage):
        result = [stage.make() if stage.on_every_rank or PartialState().is_main_process else None]
        return broadcast_object_list(result)[0]
    from prefopt.procedures.train import train

    return train(stage.recipe)


def _read_mark(stage: Stage) -> _Mark | None:
    try:
        return _Mark(**json.loads((stage.folder / MARK).read_text(encoding="utf-8"))[stage.name])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write_mark(stage: Stage, mark: _Mark) -> None:
    PartialState().wait_for_everyone()
    on_main(lambda: _put_mark(stage, mark))


def _put_mark(stage: Stage, mark: _Mark) -> None:
    path = stage.folder / MARK
    try:
        with full_disk_said(stage.folder):
            stage.folder.mkdir(parents=True, exist_ok=True)
            marks = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_whole(path, json.dumps({**marks, stage.name: asdict(mark)}, indent=2))
    except OSError as error:
        raise UserError(f"{stage.folder}: cannot be written: {error.strerror}. Choose another output_dir") from error
