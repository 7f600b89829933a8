"""SIGTERM: a checkpoint after the step that is under way, the same one on all ranks, and the end of the process."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager

from prefopt.console import say
from prefopt.errors import Stopped


class StopOnSigterm(TrainerCallback):
    """Transformers' checkpoint on SIGTERM, taken where a resume from it is exact and the ranks agree.

    Its own callback takes the signal over when the trainer is made, in whatever thread that is, and saves in the middle
    of a step too. This one does so while training runs, in the main thread. `agreed` is set by the trainer when any
    rank was `asked` before the step's end. An evaluation is not waited for: the run ends without a save, as after a
    kill. Raises `Stopped`, so that nothing is done that ends a finished run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.agreed = False
        # A save that is cut off does no harm here, so there is no need to wait for a SIGKILL first.
        self._manager = CheckpointManager(trainer, kill_wait=0)

    @property
    def asked(self) -> bool:
        """Whether this process was told to end."""
        return self._manager.is_checkpoint_requested

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal over, once however often the loop begins."""
        self.agreed = self._manager.is_checkpoint_requested = False
        if self._manager._original_sigterm_handler is None and _in_main_thread():
            self._manager.setup_signal_handler()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a save, after which the run stops; at once where a save would be a model alone."""
        if self.agreed and args.save_only_model:
            raise self._stopped(state)
        control.should_save = control.should_save or self.agreed
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop in the middle of an evaluation, which may be long."""
        if self.asked:
            raise self._stopped(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after a save, also when the signal came during it."""
        asked = torch.tensor(float(self.asked or self.agreed), device=args.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum").item():
            raise self._stopped(state)

    def release(self) -> None:
        """Give the signal back to whom it belonged to before training."""
        if self._manager._original_sigterm_handler is not None:
            signal.signal(signal.SIGTERM, self._manager._original_sigterm_handler)
            self._manager._original_sigterm_handler = None

    def _stopped(self, state: TrainerState) -> Stopped:
        say(f"stopped by SIGTERM after step {state.global_step}; the same command goes on")
        return Stopped(128 + signal.SIGTERM)


def spare_worker(number: int) -> None:
    """Let a worker of a data loader outlive a SIGTERM to all processes of a job: the step under way needs its rows.

    Its parent, which ends workers by the same signal, is still obeyed. For `DataLoader(worker_init_fn=...)`.
    """
    if hasattr(signal, "sigwaitinfo"):  # nowhere but on Linux can it be seen whom a signal is from
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
