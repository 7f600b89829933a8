"""The embedded default does what it promises: the true reward rises clearly, and the answers stay answers."""

from __future__ import annotations

import json

import pytest

from prefopt.cli import main


@pytest.mark.slow
def test_the_quickstart_raises_the_true_reward(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", "quickstart", "--output_dir", str(folder), "--disable_tqdm"]) == 0
    result = json.loads((folder / "world" / "comparison.json").read_text())
    assert result["reward_gain"] > 0.5 > 5 * result["reward_gain_se"]
    assert result["before"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert 0.0 < result["after"]["kl"] < 6.0
    assert result["after"]["finished"] > 0.95
    assert result["after"]["valid"] > 0.6
    assert (folder / "plots" / "overview.png").is_file()


def test_a_small_quickstart_runs_every_stage(tmp_path):
    folder = tmp_path / "run"
    procedure = "{name: small_world, world: {texts: 800, prompts: 16, eval_prompts: 4, eval_pair_prompts: 8}, "
    procedure += "start: {loss: {name: sft}, learning_rate: 4e-3, eval_strategy: 'no'}}"
    options = ["--output_dir", str(folder), "--procedure", procedure, "--disable_tqdm", "--num_train_epochs", "1"]
    assert main(["train", "quickstart", *options]) == 0
    marks = json.loads((folder / "world" / "stage.json").read_text())
    assert {name for name, mark in marks.items() if mark["status"] == "done"} == {"texts", "pairs", "compare"}
    assert main(["train", "quickstart", *options]) == 0
