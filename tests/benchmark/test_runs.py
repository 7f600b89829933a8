"""Training runs that stand still between steps end where, and with the weights, that they end with by themselves."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from prefopt.benchmark.runs import Paced, paced
from tests import helpers
from tests.training import make_trainer, trained, weights

SETTINGS = {"per_device_train_batch_size": 2, "num_train_epochs": 2}


def test_two_runs_in_turn_give_the_weights_of_each_alone(tmp_path):
    rows = helpers.text_pairs(6)
    alone = trained(tmp_path / "alone", rows, **SETTINGS)
    with paced({name: make_trainer(tmp_path / name, rows, **SETTINGS) for name in ("a", "b")}) as runs:
        for _ in range(6):
            for run in runs.values():
                run.step()
        for run in runs.values():
            torch.testing.assert_close(weights(run.trainer.model), alone, rtol=0, atol=0)


def test_a_call_is_one_step(tmp_path):
    run = Paced(make_trainer(tmp_path, helpers.text_pairs(6), **SETTINGS))
    try:
        for step in range(3):
            assert run.trainer.state.global_step == step
            run.step()
    finally:
        run.close()
    assert run.trainer.state.global_step == 3


def test_a_run_that_is_over_says_so(tmp_path):
    run = Paced(make_trainer(tmp_path, helpers.text_pairs(2), **{**SETTINGS, "num_train_epochs": 1}))
    run.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="made for fewer steps"):
            run.step()
    run.close()


class Fails(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise ValueError("no step here")


def test_what_training_raises_is_raised_where_the_step_was_asked_for(tmp_path):
    run = Paced(make_trainer(tmp_path, helpers.text_pairs(2), callbacks=[Fails()], **SETTINGS))
    with pytest.raises(ValueError, match="no step here"):
        run.step()
    run.close()
