"""The runner repeats nothing that is done, and finishes what was cut off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt import cli
from prefopt.errors import UserError
from prefopt.losses import get, load_plugin
from prefopt.losses.registry import forget
from prefopt.procedures import MakeStage, TrainStage, run_plan
from prefopt.procedures.inputs import inputs_of, sampled
from prefopt.procedures.runner import MARK
from prefopt.recipe import load_recipe
from tests.helpers import make_model, make_tokenizer, text_pairs


class Log(list):
    """Names of the stages that ran."""

    def stage(self, name: str, folder, settings=None, fails: bool = False) -> MakeStage:
        def make() -> str:
            self.append(name)
            if fails:
                raise RuntimeError("cut off")
            return f"made {name}"

        return MakeStage(name, folder, make, settings or {})


def test_finished_stages_are_not_run_again(tmp_path):
    log = Log()
    stages = [log.stage("a", tmp_path / "w"), log.stage("b", tmp_path / "w"), log.stage("c", tmp_path / "c")]
    assert run_plan(stages) == "made c"
    assert run_plan(stages) is None
    assert log == ["a", "b", "c"]
    assert {mark["status"] for mark in json.loads((tmp_path / "w" / MARK).read_text()).values()} == {"done"}


def test_a_stage_that_was_cut_off_runs_again_and_the_ones_before_do_not(tmp_path):
    log = Log()
    with pytest.raises(RuntimeError):
        run_plan([log.stage("a", tmp_path / "a"), log.stage("b", tmp_path / "b", fails=True)])
    run_plan([log.stage("a", tmp_path / "a"), log.stage("b", tmp_path / "b")])
    assert log == ["a", "b", "b"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    log = Log()
    run_plan([log.stage("a", tmp_path, {"n": 1})])
    with pytest.raises(UserError, match=r"settings:\n  n: 1 in the run folder, 2 now\nChoose another output_dir"):
        run_plan([log.stage("a", tmp_path, {"n": 2})])


def test_a_stage_depends_on_the_ones_before_it(tmp_path):
    log = Log()
    run_plan([log.stage("a", tmp_path / "a", {"n": 1}), log.stage("b", tmp_path / "b")])
    with pytest.raises(UserError, match="what an earlier stage of the plan left, which has changed since"):
        run_plan([log.stage("a", tmp_path / "other", {"n": 2}), log.stage("b", tmp_path / "b")])


@pytest.mark.parametrize("weights", ["checkpoint-5", "model.safetensors", "pytorch_model.bin"])
def test_weights_of_something_else_are_not_written_over(weights, tmp_path):
    (tmp_path / weights).mkdir()
    with pytest.raises(UserError, match=r"did not make\. Choose another output_dir"):
        run_plan([Log().stage("a", tmp_path)])


def test_a_stage_without_weights_gives_way_to_other_settings(tmp_path):
    with pytest.raises(RuntimeError):
        run_plan([Log().stage("a", tmp_path, {"n": 1}, fails=True)])
    assert run_plan([Log().stage("a", tmp_path, {"n": 2})]) == "made a"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written: .*Choose another output_dir"):
        run_plan([Log().stage("a", tmp_path / "file" / "run")])


def test_a_disk_that_is_full_when_the_mark_is_written(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefopt.procedures.runner.write_whole", full)
    with pytest.raises(UserError, match=r"the disk is full: [\d,]+ bytes are free\. Make room"):
        run_plan([Log().stage("a", tmp_path)])


@pytest.mark.parametrize(("error", "free"), [(OSError(28, "No space left on device"), 2**30), (RuntimeError("?"), 0)])
def test_a_full_disk_is_said_in_a_line(error, free, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))

    def make() -> None:
        raise error

    with pytest.raises(UserError, match="the disk is full"):
        run_plan([MakeStage("a", tmp_path, make, {})])


# ---- training stages --------------------------------------------------------------------------------------------

RECIPE = """\
model_name_or_path: tiny
data_files: pairs.jsonl
loss: {name: dpo, beta: 0.2}
output_dir: run
per_device_train_batch_size: 4
num_train_epochs: 1
save_steps: 2
report_to: none
self_check: false
"""
LOSS = '''
from dataclasses import dataclass

from prefopt.losses import Loss, LossOutput, Needs, register


@register("nudged")
@dataclass(frozen=True)
class Nudged(Loss):
    """Source: made for this test."""

    needs = Needs(view="pairs")

    def __call__(self, view):
        return LossOutput(1 - view.chosen.total("logp"), "pair")
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model, data, a recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12)))
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "recipe.yaml"]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of it as the current folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *args: [])
    return tmp_path / "copy"


@pytest.fixture
def prefopt(folder, capsys):
    """Run `prefopt train` on the recipe; status, and all that it said."""

    def run(*overrides: str) -> tuple[int, str]:
        status = cli.main(["train", "recipe.yaml", *overrides])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def facts(*overrides: str) -> dict[str, Any]:
    return inputs_of(TrainStage("train", load_recipe("recipe.yaml", overrides)))


def move(file: Path) -> None:
    """Other weights in the same file, of the same size."""
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def cut_off(run: Path) -> None:
    """Make a finished run one that was killed before its last checkpoint."""
    shutil.rmtree(run / "checkpoint-3")
    (run / "model.safetensors").unlink()
    (run / MARK).write_text((run / MARK).read_text().replace('"done"', '"started"'))


def test_what_a_training_stage_depends_on(folder):
    plain = facts()
    assert (plain["loss"]["beta"], plain["num_train_epochs"]) == (0.2, 1)
    for free in ("output_dir", "resume", "logging_steps", "save_steps"):
        assert free not in plain
    for same in (["--output_dir", "other"], ["--reference.source", "live"], ["--reference.max_gb", "1"]):
        assert facts(*same) == plain
    for other in (["--loss.beta", "0.3"], ["--max_length", "9"], ["--reference.model", "tiny"], ["--seed", "1"]):
        assert facts(*other) != plain
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text() + "\n")
    assert facts()["data"] != plain["data"]
    move(folder / "tiny" / "model.safetensors")
    assert facts()["model"] != plain["model"]


def test_a_large_model_is_sampled_and_one_trained_again_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.procedures.inputs._WHOLE", 1000)
    torch.manual_seed(0)
    weights = torch.randn(3_000_000)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    before = sampled(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert sampled(tmp_path) == before
    save_file({"w": weights + 1e-6 * torch.randn(3_000_000)}, tmp_path / "model.safetensors")
    assert sampled(tmp_path) != before


def test_a_changed_recipe_is_refused_by_name_before_a_model_is_loaded(folder, prefopt, monkeypatch):
    cut_off(folder / "run")
    move(folder / "tiny" / "model.safetensors")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12, seed=3)))
    monkeypatch.setattr("prefopt.procedures.train.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    status, said = prefopt("--loss.beta", "0.3", "--learning_rate", "2e-6", "--logging_steps", "1")
    lines = said[said.index("error: ") :].splitlines()
    assert status == 2 and lines[0] == "error: run: not the same run:"
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        "data.pairs.jsonl", "learning_rate", "loss.beta", "model.tiny",
    ]  # fmt: skip
    assert lines[2] == "  learning_rate: 1e-06 in the run folder, 2e-06 now"
    assert lines[-1].endswith("allow_change: [data.pairs.jsonl, learning_rate, loss.beta, model.tiny]")


def test_an_allowed_change_is_said_and_the_run_goes_on(folder, prefopt):
    cut_off(folder / "run")
    status, said = prefopt("--learning_rate", "2e-6", "--allow_change", "learning_rate")
    assert status == 0
    assert "train: changed: learning_rate: 1e-06 in the run folder, 2e-06 now" in said
    assert "resume: going on from run/checkpoint-2" in said
    assert "done before" in prefopt("--learning_rate", "2e-6")[1]


def test_a_finished_run_takes_no_change_but_a_longer_horizon(folder, prefopt):
    status, said = prefopt("--learning_rate", "2e-6", "--allow_change", "learning_rate")
    assert status == 2 and "run: holds a finished run with other settings:\n  learning_rate: " in said
    status, said = prefopt("--num_train_epochs", "2")
    assert status == 2 and said.endswith("allow_change: [num_train_epochs]\n")
    longer = ("--num_train_epochs", "2", "--allow_change", "num_train_epochs")
    status, said = prefopt(*longer)
    assert status == 0
    assert "train: changed: num_train_epochs: 1 in the run folder, 2 now" in said
    assert "resume: going on from run/checkpoint-3" in said
    assert json.loads((folder / "run" / "results.json").read_text())["steps"] == 6
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    status, said = prefopt("--num_train_epochs", "3", "--allow_change", "num_train_epochs")
    assert status == 2 and "no checkpoint is left to go on from" in said


def test_an_edited_plugin_is_another_run(folder):
    (folder / "my_loss.py").write_text(LOSS)
    load_plugin("my_loss.py")
    try:
        before = facts("--loss", "{name: nudged}")
        assert list(before["plugin"]) == ["nudged"]
        (folder / "elsewhere").mkdir()
        forget(get("nudged").__module__)
        load_plugin(shutil.copy("my_loss.py", "elsewhere"))
        assert facts("--loss", "{name: nudged}") == before
        forget(get("nudged").__module__)
        load_plugin("my_loss.py")
        (folder / "my_loss.py").write_text(LOSS.replace("1 - ", "2 - "))
        assert facts("--loss", "{name: nudged}")["plugin"] != before["plugin"]
    finally:
        forget(get("nudged").__module__)


@pytest.mark.parametrize("left", ["done", "started"])
def test_never_goes_on_from_nothing(folder, prefopt, left):
    if left == "started":
        cut_off(folder / "run")
    status, said = prefopt("--resume", "never")
    assert status == 2
    assert "run: holds checkpoints or a model, and resume is never. Delete it, or choose another output_dir" in said
    assert prefopt("--resume", "never", "--output_dir", "other")[0] == 0


def test_a_checkpoint_of_another_folder_is_where_a_run_begins_and_no_more(folder, prefopt):
    """The same command goes on where the new run was, however often it is given."""
    fork = ("--output_dir", "fork", "--resume", "run/checkpoint-2", "--num_train_epochs", "2")
    assert prefopt(*fork)[0] == 2
    fork = (*fork, "--allow_change", "num_train_epochs")
    status, said = prefopt(*fork)
    assert status == 0 and "resume: going on from run/checkpoint-2" in said
    shutil.rmtree(folder / "fork" / "checkpoint-6")
    mark = folder / "fork" / MARK
    mark.write_text(mark.read_text().replace('"done"', '"started"'))
    status, said = prefopt(*fork)
    assert status == 0 and "resume: going on from fork/checkpoint-4" in said


def test_a_path_that_is_not_there_is_refused_before_the_data(folder, prefopt):
    (folder / "pairs.jsonl").write_text("not json")
    status, said = prefopt("--resume", "run/checkpoint-7")
    assert status == 2 and "there is no folder run/checkpoint-7" in said


def test_older_ways_to_say_it_are_answered(folder, prefopt):
    status, said = prefopt("--resume_from_checkpoint", "run/checkpoint-7")
    assert status == 2
    assert "write resume: auto, never, or the path of a checkpoint" in said
    status, said = prefopt("--allow_change", "[lerning_rate]")
    assert status == 2 and "there is no setting `lerning_rate`. Did you mean `learning_rate`?" in said


def test_a_start_model_that_was_made_again_is_seen(folder, prefopt):
    start = ("--procedure", "{start: {num_train_epochs: 1}}", "--output_dir", "two")
    assert prefopt(*start)[0] == 0
    cut_off(folder / "two")
    move(folder / "two" / "start" / "model.safetensors")
    status, said = prefopt(*start)
    assert status == 2 and "two: not the same run:\n  model.two/start: " in said


def test_a_checkpoint_that_is_named_is_one_of_the_recipe_s_own_run(folder):
    from prefopt.procedures import make_plan

    recipe = load_recipe("recipe.yaml", ["--procedure", "{start: {}}", "--resume", "elsewhere/checkpoint-7"])
    assert [stage.recipe.training_arguments().resume for stage in make_plan(recipe)] == [
        "auto", "elsewhere/checkpoint-7",
    ]  # fmt: skip


def test_a_longer_horizon_is_refused_where_stages_were_made_from_the_finished_one(folder, prefopt):
    """Before anything runs: the first stage, trained on, would no longer be what the second started from."""
    both = ("--procedure", "{start: {learning_rate: 1e-3}}", "--output_dir", "two")
    assert prefopt(*both)[0] == 0
    model = (folder / "two" / "start" / "model.safetensors").read_bytes()
    status, said = prefopt(*both, "--num_train_epochs", "2", "--allow_change", "num_train_epochs")
    assert status == 2 and "holds a finished run with other settings" in said
    assert (folder / "two" / "start" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("end", ["FSDP", "DEEPSPEED"])
def test_several_stages_in_one_sharded_process_are_refused(end, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{end}", "true")
    log = Log()
    stages = [log.stage("a", tmp_path / "a"), log.stage("b", tmp_path / "b")]
    with pytest.raises(UserError, match="prefopt run RECIPE"):
        run_plan(stages)
    run_plan(stages, "a")
    run_plan(stages[:1])
    assert log == ["a"]
