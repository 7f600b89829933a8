"""The line on the screen: the figures to watch, training and evaluation alike."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefopt.report.progress import LastStep, log_line


def state() -> TrainerState:
    return TrainerState(global_step=5, max_steps=120)


def test_training_and_evaluation_lines():
    logs = {"loss": 0.69314, "rewards/accuracies": 0.5, "rewards/margins": -0.01, "learning_rate": 1e-6, "epoch": 0.1}
    line = log_line(logs, state())
    assert line == "step   5/120  loss 0.6931  accuracy 0.500  margin -0.010  lr 1.0e-06"
    assert (
        log_line({"eval_loss": 0.5, "eval_rewards/accuracies": 1.0}, state())
        == "eval   5/120  loss 0.5000  accuracy 1.000"
    )


def test_the_closing_summary_is_left_to_the_report():
    assert log_line({"train_loss": 0.5, "train_runtime": 3.0}, state()) == ""


@pytest.mark.parametrize(("strategy", "step", "logs"), [("steps", 9, False), ("steps", 10, True), ("no", 10, False)])
def test_the_last_step_is_logged_unless_nothing_is(strategy, step, logs, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), logging_strategy=strategy)
    control = LastStep().on_step_end(args, TrainerState(global_step=step, max_steps=10), TrainerControl())
    assert control.should_log is logs
