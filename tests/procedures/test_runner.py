"""The runner repeats nothing that is done, and finishes what was cut off."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from prefopt.errors import UserError
from prefopt.procedures import MakeStage, run_plan
from prefopt.procedures.runner import MARK, stage_hash


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
    with pytest.raises(UserError, match="Choose another output_dir"):
        run_plan([log.stage("a", tmp_path, {"n": 2})])


def test_a_stage_depends_on_the_ones_before_it(tmp_path):
    log = Log()
    stage = log.stage("b", tmp_path)
    assert stage_hash(stage, "one") != stage_hash(stage, "two")
    run_plan([log.stage("a", tmp_path / "a", {"n": 1}), log.stage("b", tmp_path / "b")])
    with pytest.raises(UserError):
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


@pytest.mark.parametrize(("error", "free"), [(OSError(28, "No space left on device"), 2**30), (RuntimeError("?"), 0)])
def test_a_full_disk_is_said_in_a_line(error, free, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))

    def make() -> None:
        raise error

    with pytest.raises(UserError, match="the disk is full"):
        run_plan([MakeStage("a", tmp_path, make, {})])
