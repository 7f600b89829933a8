"""How a trainer's checkpoints are written and chosen: sealed before older ones go, verified before one is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.checkpoints import clear_unsealed, newest_whole, rotate, seal
from prefopt.console import say


@contextmanager
def sealed_save(trainer: Trainer, facts: dict[str, Any]) -> Iterator[None]:
    """Around the stock save of a checkpoint: a clean folder before it, a seal after it, and rotation last.

    The stock order rotates before anything could be sealed, so with a limit of 1 a kill in between would leave
    nothing. Every rank enters, since each writes files of its own.
    """
    args, state = trainer.args, trainer.state
    output_dir = Path(str(args.output_dir))
    folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        if trainer.is_world_process_zero():
            clear_unsealed(folder)
        trainer.accelerator.wait_for_everyone()
        yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        seal(folder, state.global_step, facts)
        best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
        rotate(output_dir, limit, [folder, *best])
    trainer.accelerator.wait_for_everyone()


def checkpoint_to_resume(output_dir: str) -> str | None:
    """The newest whole checkpoint of a run folder, or None; says which newer ones were passed over and why.

    The main process reads and verifies; every rank gets its answer.
    """
    found: list[Any] = [None, []]
    if PartialState().is_main_process and Path(output_dir).is_dir():
        folder, skipped = newest_whole(Path(output_dir))
        found = [None if folder is None else str(folder), skipped]
    path, skipped = broadcast_object_list(found)
    say(*(f"resume: passed over {line}" for line in skipped))
    if path is not None:
        say(f"resume: going on from {path}")
    return path
