"""One line per log event on the screen: the figures to watch. All of them are in `metrics.jsonl`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from prefopt.console import write_line

# Metric, how it is called on the screen, and its format.
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", "+.3f"),
    ("logratios/chosen", "log-ratio chosen", "+.2f"),
    ("logratios/rejected", "rejected", "+.2f"),
    ("entropy", "entropy", ".2f"),
    ("grad_norm", "grad norm", ".2g"),
    ("learning_rate", "lr", ".1e"),
)


def log_line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """The line of a training or evaluation event; empty for the closing summary of the run."""
    evaluation = "eval_loss" in logs
    if not evaluation and "loss" not in logs:
        return ""
    figures = {name.removeprefix("eval_"): value for name, value in logs.items()} if evaluation else logs
    parts = [f"{label} {figures[name]:{form}}" for name, label, form in _SHOWN if name in figures]
    width = len(str(state.max_steps))
    return f"{'eval' if evaluation else 'step'} {state.global_step:>{width}}/{state.max_steps}  " + "  ".join(parts)


class Progress(ProgressCallback):
    """The stock progress bar with our line in place of the whole dictionary."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the line above the bar; an evaluation after the last step has none."""
        line = log_line(logs or {}, state)
        if line and state.is_world_process_zero:
            write_line(line)


class Lines(PrinterCallback):
    """The same lines without a bar, for logs in files."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the line."""
        line = log_line(logs or {}, state)
        if line and state.is_local_process_zero:
            print(line, flush=True)


class LastStep(TrainerCallback):
    """Logs the last step too: the steps after the last full logging interval, or all of a short run, have figures."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log at the end of the run."""
        if args.logging_strategy != IntervalStrategy.NO and state.global_step >= state.max_steps:
            control.should_log = True
        return control


def show_progress(trainer: Trainer) -> None:
    """Put our lines in place of the stock output of a trainer; without a terminal there is no bar to redraw."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(Lines() if trainer.args.disable_tqdm or not sys.stderr.isatty() else Progress())
