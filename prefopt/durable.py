"""A trainer whose run outlives its process: sealed saves, and exact resumes of the same run and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from prefopt.checkpoints import checkpoints_in, facts_of, problem
from prefopt.config import PreferenceConfig
from prefopt.console import say
from prefopt.drift import as_facts, check_names, differences, model_facts, refuse_drift, training_facts
from prefopt.hub.trainer import HubTrainer
from prefopt.interrupt import StopOnSigterm
from prefopt.metrics import MetricSums
from prefopt.ranks import on_main
from prefopt.report.results import plain, versions
from prefopt.resuming import AUTO, checkpoint_to_resume
from prefopt.saving import checkpoint_bytes, forecast, rotate_again, sealed_save

# One file of each rank: what the next line of the log is a mean of, as far as it has come.
_WINDOW = "log_window_{}.json"


class Kept(Protocol):
    """What training changes beside the model, and a checkpoint has to hold; `bytes` is its size there."""

    @property
    def bytes(self) -> int: ...

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint; one process calls it."""

    def restore(self, folder: Path) -> None:
        """Take it from a checkpoint, on every rank. Raises `UserError` when that does not hold it."""


class DurableTrainer(HubTrainer):
    """The stock trainer with checkpoints that are whole or passed over, and resumes to the bit.

    It knows nothing of preferences: what a run is beside its settings and its model, a subclass says in
    `_resume_facts`, and what else a checkpoint holds is listed in `kept`. `_train_sums` are the metrics since the last
    line of the log.
    """

    # Narrower than in the base class.
    args: PreferenceConfig
    model: nn.Module

    def __init__(self, *, args: PreferenceConfig, **kwargs: Any) -> None:
        self.kept: list[Kept] = []
        self._train_sums = MetricSums()
        self._resumed: Path | None = None
        self._sealed_step: int | None = None
        # The stock callback would take SIGTERM over now, whether or not there is ever a training to stop.
        wanted, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        try:
            super().__init__(args=args, **kwargs)
        finally:
            args.enable_jit_checkpoint = wanted
        self.sigterm = StopOnSigterm(self)
        if wanted:
            self.add_callback(self.sigterm)
        self.add_callback(_Borders(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Train, from the start unless told otherwise, as `transformers.Trainer` does.

        `resume_from_checkpoint`: True or "auto" for the newest checkpoint of the run folder that verifies (a fresh
        start where there is none), or the path of a checkpoint or a run folder. What is passed over is said, with the
        reason.
        Raises `UserError` when nothing that is there verifies, when settings, data or model are not those of the
        checkpoint and `args.allow_change` does not name them, and when the disk has no room for what will be saved.
        """
        self._facts, self._size = self.facts(), checkpoint_bytes(self, sum(each.bytes for each in self.kept))
        check_names(self.args.allow_change, self._facts)
        self._resumed = self._checkpoint(resume_from_checkpoint)
        self._sealed_step = None
        set_seed(self.args.seed)  # whatever was drawn since the trainer was made, by an import for one
        try:
            output = super().train(None if self._resumed is None else str(self._resumed), **kwargs)
        finally:
            self.sigterm.release()
        if self._resumed is not None:
            on_main(lambda: rotate_again(self))
        return output._replace(training_loss=output.metrics["train_loss"])

    def facts(self) -> dict[str, Any]:
        """What must be the same when this run is resumed, by name, as strict JSON."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return {
            **training_facts(self.args),
            **model_facts(self.model),
            "world_size": self.args.world_size,
            "sharding": self.accelerator.distributed_type.value if sharded else "none",
            **as_facts(self._resume_facts()),
        }

    def _resume_facts(self) -> dict[str, Any]:
        """What the run is beside its settings and its model: the loss, the data, the reference."""
        return {}

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        output_dir = str(self.args.output_dir)
        if not resume:
            if checkpoints_in(Path(output_dir)):
                say(f"{output_dir}: holds checkpoints of an earlier run, which this one writes over")
            return None
        folder = checkpoint_to_resume(AUTO if resume is True else resume, output_dir)
        if folder is not None:
            say(*on_main(lambda: self._compare(folder)), f"resume: going on from {folder}")
        return folder

    def _compare(self, folder: Path) -> list[str]:
        """Refuse a checkpoint of another run; what to say of the changes that are allowed, and of other versions."""
        sealed, now = facts_of(folder), versions()
        found = differences(sealed["run"], self._facts)
        refuse_drift(found, self.args.allow_change or [], folder, "the checkpoint")
        changed = [f"resume: allowed: {difference.text('the checkpoint')}" for difference in found]
        others = [
            f"{name} {now.get(name)} (was {was})" for name, was in sealed["versions"].items() if now.get(name) != was
        ]
        return changed + ([f"resume: with other versions, so not to the bit: {', '.join(others)}"] if others else [])

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        progress = super()._init_training_state(max_steps, *args)
        # The stock loop takes the intervals from the checkpoint, whatever the settings say now.
        self.state.compute_steps(self.args, max_steps)
        return progress

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the stock method; settings that were allowed to change hold, and not those the states were saved with."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        scheduler: Any = self.lr_scheduler
        for number, (group, own) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
            was, now = getattr(scheduler, "base_lrs", [None] * (number + 1))[number], own.get("initial_lr")
            if was is not None and now is not None and was != now:
                scheduler.base_lrs[number] = now
                group["lr"] = scheduler._last_lr[number] = group["lr"] * now / was if was else now

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and facts_of(Path(checkpoint))["run"]["world_size"] != self.args.world_size:
            set_seed(self.args.seed + self.state.global_step)  # the states are of other ranks
            return
        super()._load_rng_state(checkpoint)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        # The stock loop trains one step too many from the checkpoint of a last step in the middle of an epoch.
        if self.state.global_step >= self.state.max_steps or self._has_stopped_early():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _has_stopped_early(self) -> bool:
        """Whether the checkpoint was made after early stopping had had enough."""
        callbacks = (each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback))
        spent = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in callbacks)
        return self._resumed is not None and spent

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # `eval_on_start`, and this is none
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _load_best_model(self) -> None:
        """As the stock method, with what else the checkpoint holds; one of a model alone holds nothing else."""
        super()._load_best_model()
        if not self.args.save_only_model:
            for each in self.kept:
                each.restore(Path(str(self.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._sealed_step == step and on_main(lambda: problem(folder) is None):
            return
        # The stock save knows only the callbacks of the checkpoint, and adds to the states of two of one class.
        callbacks: list[Any] = [*self.callback_handler.callbacks, self.control]
        exportable: list[Any] = [each for each in callbacks if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        facts = {"run": self._facts, "versions": versions(), "resumable": not self.args.save_only_model}
        with sealed_save(self, folder, facts, self._size):
            super()._save_checkpoint(model, trial)
            window = folder / _WINDOW.format(self.args.process_index)
            window.write_text(json.dumps(plain(self._window_state()), allow_nan=False))
            self._save_kept(folder)
        self._sealed_step = step
        self.push_checkpoint(step)

    def _save_kept(self, folder: Path) -> None:
        if self.is_world_process_zero() and not self.args.save_only_model:
            for each in self.kept:
                each.save(folder)

    def _window_state(self) -> dict[str, Any]:
        return {
            "loss": float(self._tr_loss),
            "loss_before": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged,
            "metrics": self._train_sums.state(),
        }

    def _restore(self, folder: Path) -> None:
        """Go on with what the checkpoint keeps, and with the line of the log that it was made in the middle of."""
        for each in self.kept:
            each.restore(folder)
        count, ours = facts_of(folder)["run"]["world_size"], self.args.world_size
        states = [json.loads((folder / _WINDOW.format(rank)).read_text()) for rank in range(count)]
        self._total_loss_scalar = float(states[0]["loss_before"])
        self._globalstep_last_logged = states[0]["logged_at"]
        rank = self.args.process_index
        # Sums of other ranks are as good on the first one.
        mine = [states[rank]] if count == ours else states if rank == 0 else []
        self._tr_loss += sum(float(state["loss"]) for state in mine) * ours / count
        for state in mine:
            for name, (total, number) in state["metrics"].items():
                self._train_sums.add_sum(name, float(total), float(number))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the stock method; the closing mean loss is that of the whole run, also after a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)


class _Borders(TrainerCallback):
    """Where training begins and where an epoch ends: the places at which a stock resume is not exact."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer
        self._put_off = False

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the disk, and take the log up where the checkpoint left it."""
        forecast(self.trainer, self.trainer._size)
        self.trainer._train_sums.clear()
        if self.trainer._resumed is not None:
            self.trainer._restore(self.trainer._resumed)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Put a save off where the epoch or the run ends: a resume from it would lose what is done then."""
        ends = control.should_training_stop or float(state.epoch).is_integer()
        if ends and control.should_save:
            self._put_off, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Now it is saved, after the evaluation and the line of the log that an epoch may end with."""
        if self._put_off:
            self._put_off, control.should_save = False, True
