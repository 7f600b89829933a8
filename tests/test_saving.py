"""Checkpoints of a real run: sealed, rotated after the seal, and written on a disk that has room for them."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from prefopt.checkpoints import facts_of, problem
from prefopt.errors import UserError
from prefopt.saving import checkpoint_bytes, full_disk_said, saves_left
from tests.helpers import text_pairs
from tests.training import make_trainer

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "self_check": False,
}


def make(folder: Path, **settings: Any) -> Any:
    return make_trainer(folder, text_pairs(12), **{**SETTINGS, **settings})


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint-"))


def test_every_checkpoint_is_sealed_and_rotation_comes_after(tmp_path):
    make(tmp_path, save_total_limit=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert all(problem(tmp_path / name) is None for name in checkpoints(tmp_path))


def test_a_checkpoint_says_what_run_it_is_of(tmp_path):
    make(tmp_path, hub_token="hf_" + "a" * 30).train()
    facts = facts_of(tmp_path / "checkpoint-6")
    run = facts["run"]
    assert (run["learning_rate"], run["loss"]["beta"], run["world_size"], run["model"]) == (
        1e-2, 0.1, 1, "LlamaForCausalLM",
    )  # fmt: skip
    assert len(run["data"]) == 64 and facts["resumable"] and "torch" in facts["versions"]
    assert not {"output_dir", "save_steps", "logging_steps", "hub_token"} & run.keys()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_aaa" not in written


def test_what_is_ours_in_a_checkpoint_is_plain_json(tmp_path):
    make(tmp_path).train()
    assert set(json.loads((tmp_path / "checkpoint-2" / "log_window_0.json").read_text())) == {
        "loss", "loss_before", "logged_at", "metrics",
    }  # fmt: skip


def test_the_same_step_is_not_saved_twice(tmp_path, monkeypatch):
    """A callback asks for it, or a run that goes on from its last step."""
    trainer = make(tmp_path)
    trainer.train()
    written = (tmp_path / "checkpoint-6" / "manifest.json").stat().st_mtime_ns
    trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "checkpoint-6" / "manifest.json").stat().st_mtime_ns == written
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    trainer._save_checkpoint(trainer.model, None)
    assert problem(tmp_path / "checkpoint-6") is None


def test_a_fresh_start_never_keeps_a_checkpoint_of_the_run_before(tmp_path, capsys):
    make(tmp_path).train()
    make(tmp_path, learning_rate=1e-3).train()
    assert "holds checkpoints of an earlier run, which this one writes over" in capsys.readouterr().out
    assert facts_of(tmp_path / "checkpoint-2")["run"]["learning_rate"] == 1e-3


# ---- the disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_a_save_costs_that_save_alone(tmp_path, monkeypatch):
    stock = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer = make(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-4: the disk is full: [\d,]+ bytes are free, and about [\d,]+ are"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"] and problem(tmp_path / "checkpoint-2") is None
    assert not list(tmp_path.rglob("_*"))
    assert trainer.args.save_total_limit is None


@pytest.mark.parametrize(
    ("error", "free", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2**40, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2**40, "cannot be written .*quota"),
        (OSError(errno.EFBIG, "File too large"), 2**40, "cannot be written .*too large"),
        (OSError(errno.EROFS, "Read-only file system"), 2**40, "cannot be written .*Read-only"),
        (SafetensorError("Error while serializing: I/O error: No space left on device"), 2**40, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:858]"), 0, "the disk is full"),
    ],
)
def test_every_writer_s_way_of_saying_so_is_understood(tmp_path, monkeypatch, error, free, said):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=rf"run: {said}.*: {free:,} bytes are free"), full_disk_said(tmp_path / "run"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ECONNRESET, "Connection reset"), RuntimeError("out of memory")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error), match=str(error.args[-1])), full_disk_said(tmp_path):
        raise error


@pytest.mark.parametrize("kind", ["full", "adapter", "model alone", "plain sgd"])
def test_the_forecast_is_about_what_a_checkpoint_takes(tmp_path, kind):
    settings = {"full": {}, "model alone": {"save_only_model": True}, "plain sgd": {"optim": "sgd"}}
    adapter = {"peft_config": LoraConfig(r=16, target_modules="all-linear")}
    trainer = make(tmp_path, **settings.get(kind, adapter))
    size = checkpoint_bytes(trainer)
    trainer.train()
    tokenizer = (tmp_path / "checkpoint-6" / "tokenizer.json").stat().st_size
    files = sum(path.stat().st_size for path in (tmp_path / "checkpoint-6").rglob("*")) - tokenizer
    assert 0.75 < files / size < 1.1


def test_a_run_without_room_is_refused_before_its_first_step(tmp_path, monkeypatch):
    trainer = make(tmp_path, save_total_limit=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * checkpoint_bytes(trainer) - 1))
    with pytest.raises(UserError, match=r"3 more checkpoints of .* each need [\d,]+ bytes .*, and [\d,]+ bytes"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("strategy", "every", "step", "expected"),
    [("steps", 2, 0, 4), ("steps", 2, 3, 3), ("steps", 7, 6, 1), ("steps", 100, 0, 1), ("steps", 2, 7, 0),
     ("epoch", 1, 0, 3), ("epoch", 1, 4, 2), ("best", 1, 0, None)],
)  # fmt: skip
def test_the_saves_that_are_left(strategy, every, step, expected):
    """Of seven steps in three epochs."""
    state = SimpleNamespace(max_steps=7, save_steps=every, global_step=step, num_train_epochs=3, epoch=step * 3 / 7)
    assert saves_left(SimpleNamespace(args=SimpleNamespace(save_strategy=strategy), state=state)) == expected


def test_a_run_that_saves_nothing_needs_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    make(tmp_path, save_strategy="no").train()
    assert checkpoints(tmp_path) == []
