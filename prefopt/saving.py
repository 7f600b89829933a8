"""How a trainer's checkpoints are written: sealed before older ones go, on a disk that was looked at beforehand."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from prefopt.checkpoints import begin, discard, disk_forecast, rotate, seal
from prefopt.errors import UserError
from prefopt.ranks import on_main

FULL = 2**20  # bytes free
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Moments that an optimizer holds of each parameter, by the first of these words in its name; the others hold next to
# nothing.
_MOMENTS = {
    "galore": 0, "apollo": 0, "adafactor": 0, "lomo": 0, "ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1,
    "adagrad": 1,
}  # fmt: skip
_SMALL_FILES = 2**16  # configuration, states of schedules and random numbers


def rotate_again(trainer: Trainer) -> None:
    """Delete what a run that was killed between a seal and its rotation left, where no save has come after it."""
    best = [Path(trainer.state.best_model_checkpoint)] if trainer.state.best_model_checkpoint else []
    rotate(Path(str(trainer.args.output_dir)), trainer.args.save_total_limit, best)


@contextmanager
def sealed_save(trainer: Trainer, folder: Path, facts: dict[str, Any], size: int) -> Iterator[None]:
    """Around the stock save of a checkpoint into `folder`: empty before it, a seal after it, and rotation last.

    The stock order rotates before anything could be sealed, so with a limit of 1 a kill in between would leave
    nothing. Every rank enters, since each writes files of its own. `size` is about how many bytes it needs. Raises
    `UserError` when the disk is full; then nothing is left of this save, and the checkpoints before it stay.
    """
    args, state = trainer.args, trainer.state
    best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
    limit, args.save_total_limit = args.save_total_limit, None

    def finish() -> None:
        with full_disk_said(folder, size):
            seal(folder, state.global_step, facts)
            rotate(folder.parent, limit, best, sealed=folder)

    try:
        with full_disk_said(folder, size):
            on_main(lambda: begin(folder))
            yield
        trainer.accelerator.wait_for_everyone()
        on_main(finish)
    except UserError:
        if trainer.is_world_process_zero():
            with suppress(OSError):
                discard(folder)
        raise
    finally:
        args.save_total_limit = limit


@contextmanager
def full_disk_said(folder: Path, size: int | None = None) -> Iterator[None]:
    """A write that failed for want of room as a `UserError` with the bytes free; not every writer says why it failed.

    `size` is about how many bytes were to be written, where that is known.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        number = getattr(error, "errno", None)
        if number not in _REFUSALS and "No space left" not in str(error) and free >= FULL:
            raise
        reason = f"cannot be written ({error})" if number in _REFUSALS[1:] else "the disk is full"
        needed = f", and about {size:,} are needed" if size else ""
        raise UserError(
            f"{folder}: {reason}: {free:,} bytes are free{needed}. Make room, and give the same command again to go on"
        ) from error


def checkpoint_bytes(trainer: Trainer, kept: int = 0) -> int:
    """About how many bytes a checkpoint of this trainer takes: weights, optimizer, small files, and `kept` bytes more.

    Call it before the model is wrapped. An optimizer that is not known counts as nothing, so the figure is low rather
    than high.
    """
    model: Any = trainer.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if isinstance(model, PeftModel) else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    if trainer.args.save_only_model:
        return weights + _SMALL_FILES
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer is not None:
        name = type(trainer.optimizer).__name__.lower()
    moments = next((count for word, count in _MOMENTS.items() if word in name), 0)
    states = sum(parameter.numel() * (1 if "bit" in name else parameter.element_size()) for parameter in trained)
    return weights + moments * states + kept + _SMALL_FILES


def forecast(trainer: Trainer, size: int) -> None:
    """Refuse a run whose checkpoints, of `size` bytes each, have no room on the disk. Every rank calls it."""
    args = trainer.args
    if args.save_strategy == SaveStrategy.NO:
        return
    limit = args.save_total_limit
    if limit and args.load_best_model_at_end:
        limit = max(limit, 2)  # the best one stays beside the newest
    output_dir, saves = Path(str(args.output_dir)), saves_left(trainer)
    if saves != 0:
        on_main(lambda: disk_forecast(output_dir, size, limit, saves))


def saves_left(trainer: Trainer) -> int | None:
    """Checkpoints that are still to be written, the one at the end included; None where that cannot be known."""
    args, state = trainer.args, trainer.state
    if state.global_step >= state.max_steps:
        return 0
    if args.save_strategy == SaveStrategy.STEPS:
        return -(-state.max_steps // state.save_steps) - state.global_step // state.save_steps
    if args.save_strategy == SaveStrategy.EPOCH:
        return max(1, state.num_train_epochs - int(state.epoch or 0))
    return None
