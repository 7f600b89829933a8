"""The segment recipe on the social world: its plan, what it refuses, and a run that is killed and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.errors import RecipeError
from prefopt.explain import explain
from prefopt.procedures import MakeStage, TrainStage, make_plan
from prefopt.recipe import load_recipe

SMALL = """{name: social_world, select: 'fixed:2', world: {sessions: 160, pairs: 8, eval_pairs: 4, partners: 8},
  start: {loss: {name: sft}, learning_rate: 3e-3, num_train_epochs: 6, per_device_train_batch_size: 8,
          eval_strategy: 'no', logging_steps: 10, save_steps: 30}}"""
OPTIONS = ["--procedure", " ".join(SMALL.split()), "--per_device_train_batch_size", "2", "--logging_steps", "1",
           "--num_train_epochs", "4", "--save_steps", "2", "--disable_tqdm", "--use_cpu"]  # fmt: skip


def plan(*options: str):
    return make_plan(load_recipe("segment_dpo", options))


def test_the_plan_makes_its_own_data():
    stages = plan("--output_dir", "runs/x")
    assert [stage.name for stage in stages] == ["sessions", "start", "pairs", "segments", "train", "compare"]
    start, main_run = (stage.recipe for stage in stages if isinstance(stage, TrainStage))
    assert start.data.data_files == "runs/x/world/sessions.jsonl"
    assert main_run.data.data_files["train"] == "runs/x/world/segments.jsonl"
    assert main_run.model.model_name_or_path == "runs/x/start"
    made = {stage.name: stage for stage in stages if isinstance(stage, MakeStage)}
    assert all(stage.settings["sessions"] == 4000 for stage in made.values())
    assert made["segments"].settings["select"] == "given"


def test_the_shipped_recipe_has_the_authors_settings():
    recipe = load_recipe("segment_dpo")
    assert recipe.loss[0].knobs == {"beta": 0.1}
    settings = recipe.resolved()
    found = [settings[name] for name in ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "seed")]
    assert found == [2, "cosine", 0, 11]
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 32


@pytest.mark.parametrize("loss", ["eto", "dmpo", "dpo"])
def test_any_loss_over_pairs_may_be_trained(loss):
    stages = plan("--loss", f"{{name: {loss}}}", "--procedure", "{name: social_world, select: to_end}")
    assert stages[4].recipe.loss[0].name == loss


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--procedure.select", "all"], "`all` is none of single_turn, fixed:N, to_end, given"),
        (["--procedure.select", "fixed:0"], "`fixed:0` is none of"),
        (["--procedure.select", "my_rules.py:choose"], "none of single_turn"),
        (["--procedure.world", "{session: 3}"], "Did you mean `sessions`"),
        (["--procedure.world", "{pairs: 0}"], r"procedure\.world\.pairs is 0; it must be at least 1"),
        (["--procedure.world", "{pairs: many}"], r"procedure\.world\.pairs: must be a whole number"),
        (["--procedure.world", "5"], r"procedure\.world: must be a block, such as"),
        (["--procedure.world", "[]"], r"procedure\.world: must be a block, such as"),
        (["--procedure.selects", "given"], "Did you mean `select`"),
        (["--data_files", "{train: mine.jsonl, test: held.jsonl}"], "data_files: the social world makes its own data"),
        (["--loss", "{name: kto}"], "makes pairs, and kto reads single answers"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(options, said):
    with pytest.raises(RecipeError, match=said):
        plan(*options)


def test_it_is_explained_before_anything_is_made(tmp_path):
    page = explain(load_recipe("segment_dpo", ["--output_dir", str(tmp_path / "run")]))
    assert "6. compare" in page and "the pairs, cut to the turns `given`" in page
    assert not list(tmp_path.iterdir())


def test_a_small_run_goes_through_every_stage_and_is_not_done_twice(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", "segment_dpo", "--output_dir", str(folder), *OPTIONS]
    assert main(command) == 0
    result = json.loads((folder / "world" / "comparison.json").read_text())
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-5) and result["after"]["kl"] > 1e-6
    assert "conversations that end in a sale" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "world" / "segments.jsonl").read_text().splitlines()]
    assert all(row["segments"] == {"chosen": [0, 1], "rejected": [0, 1]} for row in rows)
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 6


def run_until(folder: Path, *lines: str) -> None:
    """Run the recipe in a process of its own; killed as soon as these lines have begun, in their order, if any."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "prefopt", "train", "segment_dpo", "--output_dir", str(folder), *OPTIONS]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    awaited = list(lines)
    for line in run.stdout:
        if awaited and " ".join(line.split()).startswith(awaited[0]):
            awaited.pop(0)
            if not awaited:
                run.kill()
                break
    assert not awaited
    assert (run.wait() == 0) == (not lines)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    """In the supervised start, while pairs are sampled, and in the training on segments."""
    run_until(tmp_path / "whole")
    for lines in (["[2/6]", "step 40"], ["[3/6]"], ["[5/6]", "step 3"], []):
        run_until(tmp_path / "killed", *lines)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    for name in ("sessions.jsonl", "pairs.jsonl", "segments.jsonl", "comparison.json"):
        assert (tmp_path / "killed/world" / name).read_bytes() == (tmp_path / "whole/world" / name).read_bytes()
