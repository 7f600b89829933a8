"""Checkpoints of a real run: sealed, rotated after the seal, and the newest whole one resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefopt.checkpoints import problem
from tests.helpers import text_pairs
from tests.training import make_trainer, weights

SETTINGS = {
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
}


def run(folder: Path, **settings):
    trainer = make_trainer(folder, text_pairs(12), **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint-"))


def test_every_checkpoint_is_sealed_and_rotation_comes_after(tmp_path):
    run(tmp_path, save_total_limit=2)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert all(problem(tmp_path / name) is None for name in checkpoints(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, file):
    whole = weights(run(tmp_path / "whole").model)
    run(tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoint-6"
    damaged = folder / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = run(tmp_path / "cut")
    said = capsys.readouterr().out
    assert f"passed over checkpoint-6: {file} is cut off" in said
    assert "going on from" in said
    assert "checkpoint-4" in said
    assert torch.equal(weights(again.model), whole)
    assert problem(folder) is None


def test_a_checkpoint_that_was_never_sealed_is_not_resumed(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    run(tmp_path)
    assert "passed over checkpoint-6: not sealed" in capsys.readouterr().out


def test_nothing_to_resume_is_a_fresh_start(tmp_path):
    assert run(tmp_path, save_strategy="no").state.global_step == 6


def test_checkpoints_without_an_optimizer_are_no_place_to_go_on_from(tmp_path, capsys):
    run(tmp_path, save_only_model=True)
    run(tmp_path, save_only_model=True)
    assert "going on from" not in capsys.readouterr().out
