"""Which checkpoint a run goes on from: the newest that verifies, the one that is named, or none."""

from __future__ import annotations

from pathlib import Path

from prefopt.checkpoints import CUT_OFF, MANIFEST, checkpoints_in, facts_of, newest_whole, problem
from prefopt.console import say
from prefopt.errors import UserError
from prefopt.ranks import on_main

AUTO, NEVER = "auto", "never"
WEIGHTS = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")

_OR_ELSE = "Delete it, or choose another output_dir"


def checkpoint_to_resume(resume: str, output_dir: str) -> Path | None:
    """The checkpoint that `resume` means, verified; None for a fresh start. Says what it passes over, and why.

    `auto`: the newest of the run folder; none, where it holds none, or only what is left of saves that were cut off.
    `never`: none. A path: that checkpoint, or the newest of that run folder. Raises `UserError` when what should be
    gone on from does not verify, and for `never` in a folder that is taken. Every rank calls it.
    """
    refuse_early(resume, output_dir)
    chosen, lines = on_main(lambda: _choose(resume, Path(output_dir)))
    say(*(f"resume: {line}" for line in lines))
    return chosen


def refuse_early(resume: str, output_dir: str) -> None:
    """Refuse what can be refused without reading a checkpoint, so before data and models. Every rank calls it."""
    folder = Path(output_dir)

    def refuse() -> None:
        if resume == NEVER and holds_weights(folder):
            raise UserError(f"{folder}: holds checkpoints or a model, and resume is never. {_OR_ELSE}")
        if resume not in (AUTO, NEVER) and not Path(resume).is_dir():
            raise UserError(f"resume: there is no folder {resume}. Write auto, never, or the path of a checkpoint")

    on_main(refuse)


def holds_weights(folder: Path) -> bool:
    """Whether a run folder holds a model or checkpoints, whole or not."""
    return any(True for pattern in WEIGHTS for _ in folder.glob(pattern))


def _choose(resume: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    if resume == NEVER:
        return None, []
    if resume == AUTO:
        return _newest(output_dir)
    named = Path(resume)
    if not (named / "trainer_state.json").exists() and not (named / MANIFEST).exists() and checkpoints_in(named):
        folder, lines = _newest(named)
        if folder is None:
            raise UserError(f"resume: {named} holds no whole checkpoint: {'; '.join(lines)}")
        return folder, lines
    reason = _problem(named)
    if reason is not None:
        raise UserError(f"resume: {named}: {reason}. Name another checkpoint, or write resume: auto")
    return named, []


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder to go on from, and what to say."""
    found, skipped = newest_whole(folder, _problem)
    lines = [f"passed over {name}: {reason}" for name, reason in skipped.items()]
    if found is not None:
        return found, lines
    if any(reason != CUT_OFF for reason in skipped.values()):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise UserError(
            f"{folder}: no checkpoint can be gone on from:{reasons}\n"
            "Put a whole one back, delete these to start afresh, or choose another output_dir"
        )
    return None, [*lines, "starting afresh: no save was ever finished"] if lines else []


def _problem(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint: not whole, or a model alone."""
    reason = problem(folder)
    if reason is None and not facts_of(folder).get("resumable", True):
        return "holds a model without its optimizer (save_only_model)"
    return reason
