"""A token budget splits a step; the step and what comes of it stay as they were."""

from __future__ import annotations

import pytest
import torch

from prefopt.config import PreferenceConfig
from prefopt.errors import UserError
from tests.helpers import text_pairs
from tests.training import make_trainer, weights

ROWS = text_pairs(13)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


STEP = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}


def longest(loss: str = "dpo") -> int:
    """Tokens of the longest row by the trainer's own count of both answers, or of the one that is read."""
    data = make_trainer("unused", ROWS).train_dataset
    if loss == "sft":
        return max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in data.rows)
    sides = ("chosen", "rejected")
    return 2 * max(len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in sides) for row in data.rows)


def split(budget, loss="dpo", **settings):
    args = make_trainer("unused", ROWS, loss=loss, max_tokens_per_device=budget, **{**STEP, **settings}).args
    return args.per_device_train_batch_size, args.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, (1, 12)), (2, (2, 6)), (3, (3, 4)), (5, (4, 3)), (11, (6, 2)), (12, (12, 1)), (99, (12, 1))],
)
def test_the_largest_micro_batch_within_the_budget(rows, expected):
    assert split(rows * longest()) == expected
    assert split(rows * longest(), per_device_train_batch_size=12, gradient_accumulation_steps=1) == expected


def test_one_token_less_is_one_size_less():
    assert split(3 * longest() - 1) == (2, 6)


def test_answers_that_no_loss_reads_take_no_room():
    assert split(3 * longest("sft"), loss="sft") == (3, 4)


def test_steps_are_the_same_and_the_split_is_said(tmp_path, capsys):
    found = []
    for budget in (None, 2 * longest()):
        trainer = make_trainer(tmp_path, ROWS, num_train_epochs=2, max_tokens_per_device=budget, **STEP)
        trainer.train()
        found.append((weights(trainer.model), trainer.state.global_step))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    assert found[0][1] == found[1][1] == 4
    line = f"token budget: 12 rows a step and device in 6 micro-batches of 2, at most {2 * longest():,} tokens each"
    assert capsys.readouterr().out.count(line) == 1


def test_a_budget_that_holds_no_row_is_refused():
    with pytest.raises(UserError, match=rf"max_tokens_per_device: the longest row has {longest()} tokens"):
        split(longest() - 1)


def test_two_settings_of_the_batch_size_contradict_each_other():
    with pytest.raises(UserError, match="auto_find_batch_size"):
        PreferenceConfig(output_dir="unused", max_tokens_per_device=100, auto_find_batch_size=True)
