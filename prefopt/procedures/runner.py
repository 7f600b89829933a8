"""Runs the stages of a plan in order; what is finished is not done again, what was cut off goes on.

A stage's folder holds `stage.json`: everything the stage depends on, by name, and, written last, that it is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import release_memory

from prefopt.checkpoints import checkpoints_in
from prefopt.console import say
from prefopt.drift import Difference, check_names, differences, digest, refuse_drift
from prefopt.errors import UserError
from prefopt.hub.pushes import wait_for_pushes
from prefopt.procedures.inputs import inputs_of
from prefopt.procedures.lineage import Lineage, lineage_of
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, find_stage
from prefopt.ranks import on_main
from prefopt.report.results import write_whole
from prefopt.resuming import AUTO, holds_weights, refuse_early
from prefopt.saving import full_disk_said

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

MARK = "stage.json"
# A finished run goes on when these were changed: all that was done is still part of it. Not with stages after it, which
# were made from what it left.
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


def run_plan(stages: Sequence[Stage], only: str | None = None) -> Any:
    """Run what is missing of a plan and return what its last stage returned (None if that was done before).

    `only`: number or name of the one stage to run. Raises `UserError` when a folder holds a stage made with other
    settings, unless `allow_change` names them, and for a stage alone when one before it is not done.
    """
    chosen = None if only is None else find_stage(stages, only)
    if chosen is None and len(stages) > 1:
        _refuse_sharding()
    result, before = None, ""
    for number, stage in enumerate(stages, start=1):
        named = title(stages, number)
        passed_by = chosen is not None and stage is not chosen
        mark, changes = _enter(stage, before, goes_on=not passed_by, last=stage is stages[-1])
        before = mark.inputs
        if passed_by:
            _require_done(stage, mark, number, chosen)
            continue
        if mark.status == "done":
            say(f"{named}: done before, in {stage.folder}")
        else:
            say(f"{named}: {stage.folder}", *(f"{named}: changed: {change.text(_PLACE)}" for change in changes))
            _write_mark(stage, mark)
            with full_disk_said(stage.folder):
                result = _run(stage, lineage_of(stage, stages))
            _write_mark(stage, _Mark(mark.facts, mark.before, "done"))
        if chosen is not None:
            break
    wait_for_pushes()
    return result


def progress(stages: Sequence[Stage]) -> Iterator[tuple[Stage, bool]]:
    """Each stage of a plan and whether it is done, looked at when it is asked for; by one process, and no device.

    Raises `UserError` as `run_plan` does.
    """
    before = ""
    for stage in stages:
        mark, _ = _look(stage, before, _allowed(stage), last=stage is stages[-1])
        before = mark.inputs
        yield stage, mark.status == "done"


def title(stages: Sequence[Stage], number: int) -> str:
    """What a stage is called in the log: its name and, where there are several, its place."""
    name = stages[number - 1].name
    return f"[{number}/{len(stages)}] {name}" if len(stages) > 1 else name


def _require_done(stage: Stage, mark: _Mark, number: int, chosen: Stage | None) -> None:
    if mark.status != "done":
        assert chosen is not None
        raise UserError(
            f"--stage: `{chosen.name}` goes on from `{stage.name}`, stage {number}, which is not done: {stage.folder}. "
            f"Run --stage {number} first, or leave --stage out to run what is missing"
        )


def _refuse_sharding() -> None:
    """Refuse several stages in one process where models are sharded: the back end outlives the stage it is made for."""
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        raise UserError(
            "FSDP and DeepSpeed cannot be taken from one stage to the next in one process. Write `prefopt run RECIPE`, "
            "which launches each stage by itself, or --stage K"
        )


def _enter(stage: Stage, before: str, *, goes_on: bool, last: bool) -> tuple[_Mark, list[Difference]]:
    """As `_look`, on every rank; `goes_on`: with what the stage's recipe says of going on."""
    if goes_on and isinstance(stage, TrainStage):
        refuse_early(stage.recipe.training.get("resume", AUTO), str(stage.folder))
    return on_main(lambda: _look(stage, before, _allowed(stage), last=last))


def _allowed(stage: Stage) -> Iterable[str] | None:
    if isinstance(stage, MakeStage):
        return None
    named = stage.recipe.training.get("allow_change") or []
    return [named] if isinstance(named, str) else named


def _look(stage: Stage, before: str, allowed: Iterable[str] | None, *, last: bool) -> tuple[_Mark, list[Difference]]:
    """What a stage is made from, with `done` where it is; and the changes that are allowed. On the main process.

    `allowed` is None for a stage that is made anew or not at all. `last`: no stage comes after it.
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
        _refuse_late(stage, found, HORIZON if last else ())
    refuse_drift(found, allowed, stage.folder, _PLACE)
    if was.before != before:
        raise UserError(
            f"{stage.folder}: was made from what an earlier stage of the plan left, which has changed since. Choose "
            "another output_dir, or delete the folder"
        )
    return now, found


def _refuse_late(stage: Stage, found: Sequence[Difference], free: Sequence[str]) -> None:
    """Refuse changes to a finished run, but for the `free` ones, which let it go on."""
    late = [f"\n  {difference.text(_PLACE)}" for difference in found if not difference.is_named(free)]
    if late:
        raise UserError(
            f"{stage.folder}: holds a finished run with other settings:{''.join(late)}\n"
            "Choose another output_dir, or delete the folder"
        )
    if found and not checkpoints_in(stage.folder):
        raise UserError(
            f"{stage.folder}: this run is finished, and no checkpoint is left to go on from. Choose another output_dir"
        )


def _run(stage: Stage, lineage: Lineage | None) -> Any:
    release_memory()  # what the stage before has left
    if isinstance(stage, MakeStage):
        return stage.make() if stage.on_every_rank else on_main(stage.make)
    from prefopt.procedures.train import train

    return train(_with_rows_there(stage), lineage)


def _with_rows_there(stage: TrainStage) -> Recipe:
    """The recipe of a stage; without an evaluation where an earlier stage found no row for the test file."""
    files = stage.recipe.data.data_files
    if not stage.made_test or not isinstance(files, dict) or "test" not in files or Path(files["test"]).is_file():
        return stage.recipe
    say(f"{stage.name}: there are no held-out rows, so this stage is not evaluated, and its last step is kept")
    rest = {name: file for name, file in files.items() if name != "test"}
    return stage.recipe.replace(data_files=rest, eval_strategy="no", load_best_model_at_end=False)


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
