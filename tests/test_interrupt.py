"""A signal to end: the run stops where a resume is exact, says so, and nothing of it looks finished."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerCallback

from prefopt import cli
from prefopt.checkpoints import newest_whole
from prefopt.config import PreferenceConfig
from prefopt.errors import Stopped
from prefopt.recipe import load_recipe
from tests.helpers import make_model, make_tokenizer, text_pairs
from tests.test_resuming import SETTINGS, outcome
from tests.training import make_trainer

SPARSE = {**SETTINGS, "save_steps": 4, "enable_jit_checkpoint": True}


class Signals(TrainerCallback):
    """Sends SIGTERM to this process once, at an event of a step, and waits until it has been heard."""

    def __init__(self, event: str, step: int) -> None:
        self.at = (event, step)
        self.trainer: Any = None

    def _send(self, event: str, state: Any) -> None:
        if self.at != (event, state.global_step):
            return
        for worker in psutil.Process().children():
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not self.trainer.sigterm.asked and time.monotonic() < deadline:
            time.sleep(0.001)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("step", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("step end", state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send("evaluation", state)


def make(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
    return make_trainer(
        folder, text_pairs(13), eval_rows=text_pairs(3, seed=5), callbacks=list(callbacks), **{**SPARSE, **settings}
    )


def stopped_at(folder: Path, event: str, step: int, **settings: Any) -> Any:
    signals = Signals(event, step)
    signals.trainer = make(folder, [signals], **settings)
    with pytest.raises(Stopped) as stop:
        signals.trainer.train(resume_from_checkpoint="auto")
    assert stop.value.code == 143
    return signals.trainer


@pytest.fixture(autouse=True)
def no_signal_is_left_behind():
    """Whatever a test does, SIGTERM belongs to whom it belonged before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("step", 0, 1), ("step", 3, 4), ("step", 4, 5), ("step end", 4, 4), ("step end", 5, 6), ("step", 8, 9)],
)
def test_it_stops_after_the_step_and_goes_on_exactly(tmp_path, capsys, event, step, saved):
    """Step 3 ends an epoch and 9 the run; a signal that comes when the step is over is heard in the next one."""
    stopped_at(tmp_path / "cut", event, step)
    assert newest_whole(tmp_path / "cut")[0] == tmp_path / "cut" / f"checkpoint-{saved}"
    assert f"stopped by SIGTERM after step {saved}; the same command goes on" in capsys.readouterr().out
    whole, again = make(tmp_path / "whole"), make(tmp_path / "cut")
    whole.train()
    again.train(resume_from_checkpoint="auto")
    assert outcome(again) == outcome(whole)


def test_workers_of_the_data_loader_get_the_signal_too_and_live_on(tmp_path):
    """As when a scheduler signals all processes of a job. They end with the run."""
    settings = {"dataloader_num_workers": 1, "save_steps": 100}
    trainer = stopped_at(tmp_path, "step", 1, **settings)
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"
    others = set(multiprocessing.active_children())
    rows = iter(trainer.get_train_dataloader())
    next(rows)
    [worker] = set(multiprocessing.active_children()) - others
    with suppress(RuntimeError):  # torch minds its workers, and mostly sees the end before `join` does
        worker.terminate()  # as the data loader, and the end of this process, would
        worker.join(30)
    assert worker.exitcode == 128 + signal.SIGTERM


def test_a_signal_during_a_save_is_heard_at_its_end(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    stock = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "optimizer" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)
            while not trainer.sigterm.asked:
                time.sleep(0.001)
        stock(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.state.global_step == 4
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_an_evaluation_is_not_waited_for(tmp_path):
    """It may take long; what was saved before it is gone on from."""
    settings = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    stopped_at(tmp_path / "cut", "evaluation", 6, **settings)
    assert newest_whole(tmp_path / "cut")[0] == tmp_path / "cut" / "checkpoint-4"
    whole, again = make(tmp_path / "whole", **settings), make(tmp_path / "cut", **settings)
    whole.train()
    again.train(resume_from_checkpoint="auto")
    assert outcome(again) == outcome(whole)


def test_a_signal_before_the_first_step_of_a_resumed_run_costs_no_checkpoint(tmp_path):
    make(tmp_path, max_steps=4).train()
    written = (tmp_path / "checkpoint-4" / "manifest.json").stat().st_mtime_ns
    trainer = stopped_at(tmp_path, "step", 4, allow_change=["max_steps"])
    assert trainer.state.global_step == 5
    assert (tmp_path / "checkpoint-4" / "manifest.json").stat().st_mtime_ns == written


def test_a_run_without_an_optimizer_to_save_just_stops(tmp_path):
    stopped_at(tmp_path, "step", 2, save_only_model=True)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_signal_is_taken_over_for_training_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    make(tmp_path).evaluate()
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_in_another_thread_leaves_the_signal_alone(tmp_path):
    failed: list[BaseException] = []

    def work() -> None:
        try:
            make(tmp_path).train()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert (tmp_path / "checkpoint-9").is_dir()


def test_scripts_keep_their_signals_and_recipes_do_not(tmp_path):
    assert not PreferenceConfig(output_dir=str(tmp_path)).enable_jit_checkpoint
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\ndata_files: a.jsonl\nloss: {name: dpo}\n")
    assert load_recipe(tmp_path / "recipe.yaml").training_arguments().enable_jit_checkpoint
    options = ["--enable_jit_checkpoint", "false"]
    assert not load_recipe(tmp_path / "recipe.yaml", options).training_arguments().enable_jit_checkpoint


def test_an_interrupt_from_the_keyboard_leaves_whole_checkpoints(tmp_path, monkeypatch):
    stock = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(path) and "scheduler" in str(path):
            raise KeyboardInterrupt
        stock(value, path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        make(tmp_path / "cut").train()
    assert newest_whole(tmp_path / "cut")[0] == tmp_path / "cut" / "checkpoint-4"
    whole, again = make(tmp_path / "whole"), make(tmp_path / "cut")
    whole.train()
    again.train(resume_from_checkpoint="auto")
    assert outcome(again) == outcome(whole)


# ---- the command line -------------------------------------------------------------------------------------------

RECIPE = """\
model_name_or_path: tiny
data_files: pairs.jsonl
loss: {name: dpo}
output_dir: run
per_device_train_batch_size: 4
num_train_epochs: 2
save_steps: 100
report_to: none
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, data and a recipe, with this folder as the current one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12)))
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def hears_ctrl_c():
    """Started in the background by a shell, this process would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(("error", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_told_to_end_is_not_finished_and_the_same_command_finishes_it(
    folder, monkeypatch, capsys, error, status
):
    from prefopt.trainer import PreferenceTrainer

    stock = PreferenceTrainer.compute_loss
    sent = []

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not sent:
            sent.append(error)
            os.kill(os.getpid(), error)
            while error == signal.SIGTERM and not self.sigterm.asked:
                time.sleep(0.001)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", compute_loss)
    assert cli.main(["train", "recipe.yaml"]) == status
    said = capsys.readouterr()
    assert "stopped by" in said.out + said.err and "Traceback" not in said.err
    assert not list(folder.glob("run/*.safetensors")) and not (folder / "run" / "results.json").exists()
    assert '"started"' in (folder / "run" / "stage.json").read_text()
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert ("going on from run/checkpoint-3" in capsys.readouterr().out) == (status == 143)
    assert (folder / "run" / "results.json").exists()
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert "done before" in capsys.readouterr().out
