"""A run that was cut off goes on as if nothing had happened: from which checkpoint, and to the same bits."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from prefopt.checkpoints import CUT_OFF, begin, facts_of, seal
from prefopt.errors import UserError
from prefopt.resuming import checkpoint_to_resume
from tests.helpers import text_pairs
from tests.training import make_trainer, weights

# Windows of 6, 6 and 1 rows: the last one of an epoch has fewer micro-batches.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 4,
    "self_check": False,
}
STEPS = 9


class Cut(TrainerCallback):
    """Ends a run by an exception right after a step is saved, as a kill would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def start(folder: Path, cut: int | None = None, resume: Any = True, callbacks: Any = (), **settings: Any) -> Any:
    adapter = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    adapter = settings.pop("peft_config", adapter)
    trainer = make_trainer(
        folder,
        text_pairs(13),
        eval_rows=text_pairs(3, seed=5),
        peft_config=adapter,
        callbacks=[*callbacks, Cut(cut)],
        **{**SETTINGS, **settings},
    )
    with contextlib.suppress(InterruptedError):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """Everything a run leaves, but for what only says how long it took."""
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    timed = ("runtime", "per_second")
    history = [
        {name: value for name, value in line.items() if not name.endswith(timed)} for line in trainer.state.log_history
    ]
    state = trainer.state
    return {
        "weights": weights(trainer.model).tolist(),
        **{name: repr(torch.load(last / name, weights_only=False)) for name in ("optimizer.pt", "scheduler.pt")},
        "rng": repr(torch.load(last / "rng_state.pth", weights_only=False)),
        "log": history,
        "counters": [state.num_input_tokens_seen, state.total_flos, state.epoch],
        "best": [state.best_metric, state.best_global_step, Path(state.best_model_checkpoint or "").name],
        "callbacks": state.stateful_callbacks,
    }


@pytest.mark.parametrize("kind", ["adapter with dropout", "full", "full, whole distributions"])
def test_a_run_cut_off_after_every_step_is_the_run_itself(tmp_path, kind):
    """Nine times in a row: in three epochs, between lines of the log, and in windows that are not full."""
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    if kind.startswith("full"):
        settings["peft_config"] = None
        settings["loss"] = "tdpo2" if "distributions" in kind else "dpo"
    else:
        settings["load_best_model_at_end"] = True
    whole = start(tmp_path / "whole", callbacks=[EarlyStoppingCallback(20)], **settings)
    for step in range(1, STEPS + 1):
        start(tmp_path / "cut", cut=step, callbacks=[EarlyStoppingCallback(20)], **settings)
    again = start(tmp_path / "cut", callbacks=[EarlyStoppingCallback(20)], **settings)
    assert whole.state.global_step == again.state.global_step == STEPS
    assert outcome(again) == outcome(whole)


def test_a_rotation_that_a_kill_cut_off_is_made_up_for(tmp_path):
    """Also where the run has nothing more to save."""
    start(tmp_path, save_total_limit=None)
    assert len(list(tmp_path.glob("checkpoint-*"))) > 2
    start(tmp_path, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_what_happens_at_the_end_of_an_epoch_is_not_lost(tmp_path, cut):
    """Evaluated and logged by the epoch, saved by the step: the save of an epoch's last step comes after them."""
    settings = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 3, "peft_config": None}
    settings["eval_on_start"] = True
    whole = start(tmp_path / "whole", **settings)
    start(tmp_path / "cut", cut=cut, **settings)
    again = start(tmp_path / "cut", **settings)
    assert outcome(again) == outcome(whole)


def test_a_last_step_in_the_middle_of_an_epoch_is_the_last(tmp_path):
    settings = {"max_steps": 4, "eval_strategy": "epoch", "peft_config": None}
    whole = start(tmp_path, **settings)
    again = start(tmp_path, **settings)
    assert (whole.state.global_step, again.state.global_step) == (4, 4)
    assert outcome(again) == outcome(whole)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "entropy", "peft_config": None}
    stopped = start(tmp_path, callbacks=[EarlyStoppingCallback(2, 10.0)], **settings)
    assert stopped.state.global_step == 3
    again = start(tmp_path, callbacks=[EarlyStoppingCallback(2, 10.0)], **settings)
    assert outcome(again) == outcome(stopped)


def test_early_stopping_of_a_training_before_does_not_end_the_next_at_once(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "entropy", "peft_config": None}
    trainer = start(tmp_path, callbacks=[EarlyStoppingCallback(2, 10.0)], **settings)
    trainer.train()
    assert trainer.state.global_step == 3


def test_two_callbacks_of_a_class_and_a_new_one(tmp_path):
    """The stock save adds to the states of the first two, and does not know the third."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "entropy", "peft_config": None}
    start(tmp_path, cut=2, **settings)
    for cut in (5, 6):
        pair = [EarlyStoppingCallback(20, 10.0), EarlyStoppingCallback(30, 10.0)]
        again = start(tmp_path, cut=cut, callbacks=pair, **settings)
    counters = [
        (each.early_stopping_patience, each.early_stopping_patience_counter)
        for each in again.callback_handler.callbacks
        if isinstance(each, EarlyStoppingCallback)
    ]
    assert counters == [(20, 4), (30, 4)]


def test_the_intervals_of_now_hold_after_a_resume(tmp_path):
    start(tmp_path, cut=4, peft_config=None)
    again = start(tmp_path, peft_config=None, logging_steps=2, save_steps=5)
    assert [line["step"] for line in again.state.log_history if "loss" in line] == [4, 6, 8]
    assert not (tmp_path / "checkpoint-6").exists()


def test_the_closing_mean_is_that_of_the_whole_run(tmp_path):
    whole = start(tmp_path / "whole", peft_config=None)
    start(tmp_path / "cut", cut=6, peft_config=None)
    again = start(tmp_path / "cut", peft_config=None)
    closing = [trainer.state.log_history[-1]["train_loss"] for trainer in (whole, again)]
    losses = [line["loss"] * steps for line, steps in zip(whole.state.log_history, (4, 4), strict=False)]
    assert closing[0] == closing[1] and closing[0] > sum(losses) / STEPS


def test_the_random_states_of_another_world_size_are_not_taken(tmp_path):
    """Rank 0 of two would find a file of its own name in the folder that four ranks left, and rank 3 none."""

    class State(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(torch.get_rng_state())

    found: list[torch.Tensor] = []
    start(tmp_path, cut=4)
    folder = tmp_path / "checkpoint-4"
    stored = torch.load(folder / "rng_state.pth", weights_only=False)["cpu"]
    shutil.copy(folder / "log_window_0.json", folder / "log_window_1.json")
    facts = facts_of(folder)
    seal(folder, 4, {**facts, "run": {**facts["run"], "world_size": 2}})
    start(tmp_path, cut=5, callbacks=[State()], allow_change=["world_size"])
    set_seed(42 + 4)
    assert torch.equal(found[0], torch.get_rng_state()) and not torch.equal(found[0], stored)


# ---- which checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run with checkpoints of steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("run") / "run"
    start(folder, save_steps=3, peft_config=None)
    return folder


@pytest.fixture
def run(run_folder, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def test_auto_takes_the_newest_that_is_whole_and_says_what_it_passed_over(run, capsys):
    damage(run / "checkpoint-9")
    begin(run / "checkpoint-6")
    assert checkpoint_to_resume("auto", str(run)) == run / "checkpoint-3"
    assert capsys.readouterr().out.splitlines() == [
        "resume: passed over checkpoint-9: model.safetensors is cut off "
        f"({(run / 'checkpoint-9' / 'model.safetensors').stat().st_size} bytes, sealed with "
        f"{(run / 'checkpoint-9' / 'model.safetensors').stat().st_size + 1})",
        f"resume: passed over checkpoint-6: {CUT_OFF}",
    ]


def test_auto_starts_afresh_where_there_is_nothing(tmp_path, capsys):
    assert checkpoint_to_resume("auto", str(tmp_path / "not there yet")) is None
    assert capsys.readouterr().out == ""


def test_auto_starts_afresh_after_a_first_save_that_was_cut_off(tmp_path, capsys):
    begin(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    assert checkpoint_to_resume("auto", str(tmp_path)) is None
    assert "passed over checkpoint-2: its save was cut off\nresume: starting afresh" in capsys.readouterr().out


def test_auto_never_starts_afresh_over_checkpoints_that_were_whole_once(run):
    for step in (3, 6):
        damage(run / f"checkpoint-{step}")
    (run / "checkpoint-9" / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        checkpoint_to_resume("auto", str(run))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{run}: no checkpoint can be gone on from:"
    assert lines[1] == "  checkpoint-9: not sealed" and lines[2].startswith("  checkpoint-6: model.safetensors is cut")
    assert "delete these to start afresh, or choose another output_dir" in lines[-1]


def test_a_model_without_its_optimizer_is_no_place_to_go_on_from(tmp_path):
    start(tmp_path, save_only_model=True, save_steps=9, peft_config=None)
    with pytest.raises(UserError, match="checkpoint-9: holds a model without its optimizer"):
        checkpoint_to_resume("auto", str(tmp_path))


@pytest.mark.parametrize("left", ["checkpoint-6", "model.safetensors"])
def test_never_writes_over_nothing(run, left):
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / left).exists() or (run / left).touch()
    with pytest.raises(UserError, match=r"and resume is never\. Delete it, or choose another output_dir"):
        checkpoint_to_resume("never", str(run))


def test_never_starts_afresh_elsewhere(tmp_path):
    assert checkpoint_to_resume("never", str(tmp_path)) is None


def test_a_path_is_a_checkpoint_or_a_run_folder(run, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    assert checkpoint_to_resume(str(run / "checkpoint-3"), elsewhere) == run / "checkpoint-3"
    damage(run / "checkpoint-9")
    assert checkpoint_to_resume(str(run), elsewhere) == run / "checkpoint-6"
    renamed = (run / "checkpoint-3").rename(tmp_path / "the good one")
    assert checkpoint_to_resume(str(renamed), elsewhere) == renamed


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("checkpoint-6", "checkpoint-6: model.safetensors is cut off .*Name another checkpoint"),
        ("checkpoint-9", "checkpoint-9: not sealed"),
        ("nowhere", "there is no folder .*nowhere. Write auto, never, or the path of a checkpoint"),
    ],
)
def test_a_path_that_cannot_be_gone_on_from_is_refused(run, tmp_path, path, reason):
    damage(run / "checkpoint-6")
    (run / "checkpoint-9" / "manifest.json").unlink()
    with pytest.raises(UserError, match=reason):
        checkpoint_to_resume(str(run / path), str(tmp_path))
    trainer = make_trainer(tmp_path / "other", text_pairs(13), **SETTINGS)
    with pytest.raises(UserError, match=reason):
        trainer.train(resume_from_checkpoint=str(run / path))
    assert trainer.state.global_step == 0


def test_without_a_word_training_in_python_starts_afresh(run, capsys):
    """As in transformers, and so in TRL."""
    again = start(run, resume=None, save_steps=3, peft_config=None)
    assert len(again.state.log_history) == 3
    assert "going on from" not in capsys.readouterr().out


def test_a_finished_run_is_finished(run):
    before = outcome(start(run, save_steps=3, peft_config=None))
    written = (run / "checkpoint-9" / "manifest.json").stat().st_mtime_ns
    assert outcome(start(run, save_steps=3, peft_config=None)) == before
    assert (run / "checkpoint-9" / "manifest.json").stat().st_mtime_ns == written


# ---- another run ------------------------------------------------------------------------------------------------


def test_another_run_is_refused_with_what_differs(run):
    with pytest.raises(UserError) as error:
        start(run, save_steps=3, peft_config=None, learning_rate=2e-2, seed=1, logging_steps=1)
    assert str(error.value) == (
        f"{run}/checkpoint-9: not the same run:\n"
        "  learning_rate: 0.01 in the checkpoint, 0.02 now\n"
        "  seed: 42 in the checkpoint, 1 now\n"
        "Set these back, choose another output_dir, or go on all the same with allow_change: [learning_rate, seed]"
    )


def test_a_change_that_is_allowed_is_said_and_sealed(run, capsys):
    (run / "checkpoint-9").rename(run / "_aside")
    settings = {"save_steps": 3, "peft_config": None, "learning_rate": 2e-2}
    again = start(run, allow_change="learning_rate", **settings)
    assert "resume: allowed: learning_rate: 0.01 in the checkpoint, 0.02 now" in capsys.readouterr().out
    assert again.state.global_step == STEPS
    start(run, **settings)  # what was allowed is the run now


def test_other_data_is_refused_unless_it_is_allowed(run):
    def trainer(**settings: Any) -> Any:
        return make_trainer(run, text_pairs(13, seed=9), **{**SETTINGS, **settings})

    with pytest.raises(UserError, match=r"\n  data: [0-9a-f]{12}\.\.\. in the checkpoint, [0-9a-f]{12}\.\.\. now\n"):
        trainer().train(resume_from_checkpoint="auto")
    trainer(allow_change=["data"]).train(resume_from_checkpoint="auto")


def test_a_longer_horizon_is_a_change_like_any_other(run):
    with pytest.raises(UserError, match="num_train_epochs: 3 in the checkpoint, 4 now"):
        start(run, peft_config=None, num_train_epochs=4)
    again = start(run, peft_config=None, num_train_epochs=4, allow_change=["num_train_epochs"])
    assert again.state.global_step == 12


def test_a_name_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"there is no setting `lerning_rate`\. Did you mean `learning_rate`\?"):
        start(tmp_path, allow_change=["lerning_rate"])


def test_other_versions_are_said(run, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.durable.versions", lambda: {"torch": "1.0"})
    start(run, save_steps=3, peft_config=None)
    assert re.search(r"resume: with other versions, so not to the bit: .*torch 1\.0 \(was ", capsys.readouterr().out)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_an_allowed_learning_rate_holds_from_the_next_step_on(tmp_path, schedule):
    def run(rate, resume=None, **settings):
        trainer = make_trainer(
            tmp_path, text_pairs(8), optim="adamw_torch", learning_rate=rate, weight_decay=settings.pop("decay", 0.0),
            lr_scheduler_type=schedule, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    rates = {line["step"]: line["learning_rate"] for line in run(1e-3).state.log_history if "learning_rate" in line}
    changed = run(
        2e-3, str(tmp_path / "checkpoint-2"), allow_change=["learning_rate", "weight_decay"], decay=0.1
    )  # fmt: skip
    later = [line for line in changed.state.log_history if "learning_rate" in line and line["step"] > 2]
    assert [line["learning_rate"] for line in later] == pytest.approx([2 * rates[3], 2 * rates[4]])
    assert max(group["weight_decay"] for group in changed.optimizer.param_groups) == 0.1
