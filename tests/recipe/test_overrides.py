"""Options win over the file, the file over the defaults, and options obey the same rules as lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.errors import RecipeError
from prefopt.procedures import TrainStage, make_plan
from prefopt.recipe import LossSpec, Recipe, load_recipe
from tests.recipe.mistakes import BASE


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function: options (and a text) -> recipe."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str, text: str = BASE) -> Recipe:
        Path("recipe.yaml").write_text(text)
        return load_recipe("recipe.yaml", options)

    return run


def test_precedence(load):
    assert load().resolved()["learning_rate"] == 5e-6
    assert load("--learning_rate=3e-6").resolved()["learning_rate"] == 3e-6
    assert load(text=BASE.replace("learning_rate: 5e-6\n", "")).resolved()["learning_rate"] == 1e-6


@pytest.mark.parametrize(
    "options",
    [
        ["--loss.beta=0.2", "--max_length=null", "--use_cpu=true", "--weight_decay=-0.0"],
        ["--loss.beta", "0.2", "--max_length", "null", "--use_cpu", "--weight_decay", "-0.0"],
        ["--use_cpu", "--max_length", "null", "--weight_decay=-0.0", "--loss", "{name: dpo, beta: 0.2}"],
    ],
)
def test_forms_of_an_option(load, options):
    recipe = load(*options)
    assert recipe.loss == (LossSpec("dpo", {"beta": 0.2}),)
    assert recipe.training == {"learning_rate": 5e-6, "max_length": None, "use_cpu": True, "weight_decay": 0.0}


def test_lists_and_blocks(load):
    mixture = "loss: [{name: dpo}, {name: sft}]\nloss_weights: [1, 0.5]\n"
    recipe = load(
        "--loss.0.beta",
        "0.3",
        "--loss_weights",
        "[1, 2]",
        text=BASE.replace("loss:\n  name: dpo\n  beta: 0.1\n", mixture),
    )
    assert recipe.loss == (LossSpec("dpo", {"beta": 0.3}), LossSpec("sft"))
    assert recipe.loss_weights == (1, 2)
    assert load("--data_files", "[a.jsonl, b.jsonl]").data.data_files == ["a.jsonl", "b.jsonl"]
    assert load("--reference.model", "other").reference.model == "other"
    assert (
        load("--from_scratch", "{model_type: llama}", "--model_name_or_path", "null").model.model_name_or_path is None
    )


def test_text_is_taken_as_it_stands(load):
    assert load("--run_name", "a: b # c").training["run_name"] == "a: b # c"
    assert load("--run_name", '"quoted"').training["run_name"] == "quoted"
    assert load("--run_name=a=b").training["run_name"] == "a=b"


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--loss.betta", "1"], "--loss.betta: `dpo` does not read it. Did you mean `beta`? Its knobs: beta."),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got `fast`."),
        (["--seed=1", "--seed=2"], "--seed: given twice. Keep one."),
        (["learning_rate=1"], "learning_rate=1: is not an option. Write --name=value."),
        (["--max_length.a", "1"], "--max_length.a: `1024` has no `a` below it."),
        (["--data_files.3", "a"], "--data_files.3: this is a list: write a number from 0 to 0, not `3`."),
        (["--run_name", "[a"], "--run_name: not valid YAML"),
        (["--torch_dtype", "bfloat16"], "--torch_dtype: write dtype: bfloat16."),
        (["--from_scratch.hidden_size", "3"], "contradicts from_scratch"),
        (["--no_bf16"], "--no_bf16: there is no such setting."),
    ],
)
def test_refusals_name_the_option(load, options, answer):
    with pytest.raises(RecipeError) as refusal:
        load(*options)
    assert answer in str(refusal.value)


def test_a_knob_the_new_loss_does_not_read_is_named_with_its_line(load):
    with pytest.raises(RecipeError, match=r"^recipe.yaml:5: loss.beta: `sft` does not read it"):
        load("--loss.name", "sft")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segment_dpo", ["--procedure", "null"]),
        ("quickstart", ["--procedure", "null"]),
        ("spin", ["--procedure.world", "null", "--procedure.start", "null", "--procedure.measure", "null"]),
        ("online", ["--procedure.world", "null", "--procedure.start", "null", "--procedure.measure", "null",
                    "--procedure.judge", "{function: my_judge.py:score}"]),
        ("stepwise", ["--procedure.world", "null", "--procedure.start", "null"]),
        ("eto_rounds", ["--procedure.start", "null", "--procedure.environment", "{function: my_env.py:make}"]),
    ],
)  # fmt: skip
def test_null_takes_the_embedded_world_out_of_a_shipped_recipe(name, options):
    own = ["--from_scratch", "null", "--model_name_or_path", "m", "--data_files", "a.jsonl", "--test_split_size", "0.1"]
    recipe = load_recipe(name, [*options, *own])
    first = next(stage.recipe for stage in make_plan(recipe) if isinstance(stage, TrainStage))
    assert first.model.model_name_or_path == "m"
    assert "world" not in recipe.procedure and "start" not in recipe.procedure


@pytest.mark.parametrize("block", ["procedure", "reference", "datasets", "targets"])
def test_null_takes_any_block_out(tmp_path, block):
    file = tmp_path / "recipe.yaml"
    file.write_text("model_name_or_path: m\ndata_files: a.jsonl\nloss: {name: dpo}\n")
    assert load_recipe(file, [f"--{block}", "null"]) == load_recipe(file)


def test_a_recipe_without_its_loss_is_told_that_it_is_missing():
    with pytest.raises(RecipeError, match=r"loss: is missing"):
        load_recipe("dpo", ["--loss", "null"])
