"""Plans are pure: stages, folders and settings follow from the recipe alone."""

from __future__ import annotations

import pytest

from prefopt.errors import RecipeError
from prefopt.procedures import MakeStage, TrainStage, make_plan, procedures
from prefopt.recipe import load_recipe

BASE = """
from_scratch: {model_type: llama, vocab_size: 512, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4}
data_files: pairs.jsonl
loss: {name: dpo, beta: 0.3}
learning_rate: 1e-4
output_dir: runs/x
"""


def plan(tmp_path, extra: str = "", text: str = BASE):
    file = tmp_path / "recipe.yaml"
    file.write_text(text + extra)
    return make_plan(load_recipe(file))


def test_the_plain_procedure_is_one_stage(tmp_path):
    (stage,) = plan(tmp_path)
    assert isinstance(stage, TrainStage)
    assert str(stage.folder) == "runs/x"


def test_a_supervised_start_comes_first_and_hands_its_model_on(tmp_path):
    start, main = plan(tmp_path, "procedure: {name: single, start: {learning_rate: 1e-3, num_train_epochs: 4}}\n")
    assert [loss.name for loss in start.recipe.loss] == ["sft"]
    assert start.recipe.training["learning_rate"] == 1e-3
    assert start.recipe.model.from_scratch is not None
    assert main.recipe.model.from_scratch is None
    assert main.recipe.model.model_name_or_path == str(start.folder) == "runs/x/start"
    assert (main.recipe.loss[0].knobs, main.recipe.training["learning_rate"]) == ({"beta": 0.3}, 1e-4)


def test_a_start_without_settings_takes_the_recipes(tmp_path):
    start, _ = plan(tmp_path, "procedure: {name: single, start: {}}\n")
    assert start.recipe.training["learning_rate"] == 1e-4


def test_the_small_world_makes_its_own_data(tmp_path):
    text = BASE.replace("data_files: pairs.jsonl\n", "")
    stages = plan(tmp_path, "procedure: {name: small_world, world: {texts: 100}}\n", text)
    assert [stage.name for stage in stages] == ["texts", "start", "pairs", "train", "compare"]
    made = [stage for stage in stages if isinstance(stage, MakeStage)]
    assert all(stage.settings["texts"] == 100 for stage in made)
    assert stages[1].recipe.data.data_files == "runs/x/world/texts.jsonl"
    assert stages[3].recipe.data.data_files["train"] == "runs/x/world/pairs.jsonl"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{name: singel}", "Did you mean `single`"),
        ("{name: single, starts: {}}", "Did you mean `start`"),
        ("{name: single, start: {learning_rat: 1}}", "Did you mean `learning_rate`"),
        ("{name: small_world, world: {text: 5}}", "Did you mean `texts`"),
        ("{name: small_world, world: {texts: many}}", "whole number"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, block, message):
    with pytest.raises(RecipeError, match=message):
        plan(tmp_path, f"procedure: {block}\n")


def test_known_procedures():
    assert procedures() == ["online", "single", "small_world", "social_world", "spin", "stepwise"]


def test_an_adapter_on_random_weights_needs_a_start(tmp_path):
    """Without one, the weights the adapter belongs to are nowhere."""
    with pytest.raises(RecipeError, match=r"use_peft: an adapter alone would be kept.*procedure\.start"):
        plan(tmp_path, "use_peft: true\n")
    _, main = plan(tmp_path, "use_peft: true\nprocedure: {start: {}}\n")
    assert main.recipe.model.use_peft


def test_the_shipped_spin_recipe_is_the_papers_without_what_the_small_world_needs():
    """Settings of the paper and of the authors' scripts: four rounds, the pairs of two, the last far closer."""
    recipe = load_recipe("spin")
    of_the_world = ("world", "start", "measure", "rounds", "beta", "learning_rate", "num_train_epochs")
    block = {name: value for name, value in recipe.procedure.items() if name not in of_the_world}
    model, data = {"from_scratch": None, "model_name_or_path": "mine"}, {"data_files": {"train": "a", "test": "b"}}
    stages = make_plan(recipe.replace({**model, **data, "procedure": block}))
    stages = [stage for stage in stages if isinstance(stage, TrainStage)]
    assert [stage.recipe.loss[0].knobs["beta"] for stage in stages] == [0.1, 0.1, 0.1, 5.0]
    assert [stage.recipe.training["learning_rate"] for stage in stages] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert {stage.recipe.training["num_train_epochs"] for stage in stages} == {2.0}
    assert {stage.recipe.training["lr_scheduler_type"] for stage in stages} == {"linear"}


@pytest.mark.parametrize("name", ["spin", "online", "stepwise"])
def test_the_shipped_recipes_of_several_stages_need_nothing_of_the_users(name):
    """Their data are made by the first stage, and the true reward is compared by the last."""
    recipe = load_recipe(name)
    assert recipe.model.model_name_or_path is None
    first, *_, last = make_plan(recipe)
    assert (first.name, last.name) == ("texts", "compare")
