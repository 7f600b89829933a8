"""A recipe resolves in full, writes itself down, comes back equal, and can be changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prefopt.data import load_train_test
from prefopt.errors import RecipeError
from prefopt.procedures import make_plan
from prefopt.recipe import Recipe, bundled_recipes, find_recipe, load_recipe, recipe_text
from prefopt.recipe.bundled import PACKAGE
from tests import helpers
from tests.recipe.mistakes import BASE

RECIPES = {
    "plain": BASE,
    "data set": BASE.replace(
        "data_files: [pairs.jsonl]", "dataset_name: trl-lib/x\ndataset_config: main\neval_strategy: no"
    ),
    "mixture of losses": BASE.replace("loss:\n  name: dpo\n  beta: 0.1", "loss: [{name: dpo, beta: 1}, {name: sft}]"),
    "adapter": BASE + "use_peft: true\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\nlora_dropout: 0\n",
    "reference": BASE + "reference: {source: live, model: other/model, revision: '1.0'}\n",
    "mixture of data": BASE.replace(
        "data_files: [pairs.jsonl]",
        """datasets:
- {path: a, split: train, fraction: 0.5}
- {data_files: b.jsonl, columns: [prompt], test_split: 'no'}""",
    ),
    "from scratch": BASE.replace(
        "model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct", "from_scratch: {model_type: llama, hidden_size: 64}"
    ),
    "odd texts": BASE
    + """\
run_name: 'null'
hub_model_id: 1e5
eval_steps: null
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-7, a: '1e-7', b: 'on'}
procedure: {start: {learning_rate: 1e-5}}
""",
}


@pytest.fixture
def load(tmp_path):
    """A function: text -> recipe."""

    def run(text: str, name: str = "mine.yaml") -> Recipe:
        file = tmp_path / name
        file.write_text(text)
        return load_recipe(file)

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(load, tmp_path, name):
    recipe = load(RECIPES[name])
    recipe.dump(tmp_path / "dumped.yaml")
    again = load_recipe(tmp_path / "dumped.yaml")
    assert again == recipe
    assert again.output_dir == recipe.output_dir == "runs/mine"
    assert {name: again.training[name] for name in recipe.training} == recipe.training
    assert (again.model, again.data, again.reference) == (recipe.model, recipe.data, recipe.reference)
    again.dump(tmp_path / "twice.yaml")
    assert yaml.safe_load((tmp_path / "twice.yaml").read_text()) == yaml.safe_load(
        (tmp_path / "dumped.yaml").read_text()
    )


def test_equality_sees_every_part(load):
    recipes = [load(text) for text in RECIPES.values()]
    assert all((a == b) == (a is b) for a in recipes for b in recipes)
    assert load(BASE.replace("beta: 0.1", "beta: 0.10")) == load(BASE.replace("  beta: 0.1\n", ""))
    assert load(BASE) != load(BASE + "output_dir: elsewhere\n")


def test_resolved_is_complete(load):
    resolved = load(BASE.replace("  beta: 0.1\n", "")).resolved()
    assert resolved["loss"] == {"name": "dpo", "beta": 0.1}
    assert resolved["reference"] == {"source": "auto"}
    assert resolved["output_dir"] == "runs/mine"
    assert resolved["optim"] == "adamw_torch_fused"
    assert resolved["activation_checkpointing"] is True
    assert "reference" not in load(BASE.replace("name: dpo\n  beta: 0.1", "name: sft")).resolved()
    assert yaml.safe_load(yaml.safe_dump(resolved)) == resolved


def test_objective_and_arguments(load, tmp_path):
    recipe = load(RECIPES["mixture of losses"] + "loss_weights: [1, 0.5]\nuse_cpu: true\n")
    assert [(weight, loss.name) for weight, loss in recipe.objective().terms] == [(1, "dpo"), (0.5, "sft")]
    arguments = recipe.training_arguments(seed=7)
    assert (arguments.learning_rate, arguments.max_length, arguments.seed) == (5e-6, 1024, 7)
    assert arguments.output_dir == "runs/mine"
    assert arguments.loss_weights == [1, 0.5]
    assert arguments.reference is None
    assert load(RECIPES["reference"] + "use_cpu: true\n").training_arguments().reference == {
        "source": "live",
        "model": "other/model",
        "revision": "1.0",
    }
    assert not Path("runs/mine").exists()


def test_replace(load):
    recipe = load(RECIPES["adapter"] + "reference: {model: other}\n")
    changed = recipe.replace(
        {"learning_rate": 1e-4, "reference": None}, loss={"name": "sft"}, use_peft=False, output_dir="x"
    )
    assert (changed.training["learning_rate"], changed.output_dir) == (1e-4, "x")
    assert changed.loss[0].name == "sft"
    assert changed.model.lora_r == 16
    assert recipe.model.lora_r == 8
    assert changed.name == recipe.name
    assert load(BASE).replace(max_length=None).training["max_length"] is None
    assert load(RECIPES["odd texts"]).replace(procedure={}).procedure == {}
    assert recipe.replace() == recipe
    with pytest.raises(RecipeError, match=r"^recipe mine: lerning_rate: there is no such setting"):
        recipe.replace(lerning_rate=1)
    with pytest.raises(RecipeError, match=r"^recipe mine: learning_rate: "):
        recipe.replace(learning_rate=float("nan"))


def test_data_spec(load, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for seed, file in enumerate(files):
        file.write_text("".join(json.dumps(row) + "\n" for row in helpers.text_pairs(10, seed)))

    def counts(line: str) -> tuple[int, int | None]:
        train, test = load_train_test(load(BASE.replace("data_files: [pairs.jsonl]", line)).data_spec())
        return len(train.examples), None if test is None else len(test.examples)

    a, b = files
    assert counts(f"data_files: {a}") == (10, None)
    assert counts(f"data_files: [{a}, {b}]") == (20, None)
    assert counts(f"data_files: {{train: {a}, test: {b}}}") == (10, 10)
    assert counts(f"data_files: {a}\ntest_split_size: 0.2") == (8, 2)
    assert counts(f"data_files: {a}\ntest_split_size: 3") == (7, 3)
    assert counts(f"datasets: [{{data_files: {a}}}, {{data_files: {b}, fraction: 0.5}}]") == (15, None)
    named = load(BASE.replace("data_files: [pairs.jsonl]", f"data_files: {{train: {tmp_path}/*.jsonl}}"))
    assert named.data.local_files() == files
    hub = load(RECIPES["data set"])
    assert (hub.data_spec().test_split, hub.data.spec(evaluate=True).test_split) == (None, "test")
    assert (hub.data_spec().path, hub.data_spec().name) == ("trl-lib/x", "main")


def test_a_start_of_its_own_can_be_made_of_any_recipe(load):
    recipe = load(RECIPES["adapter"] + "procedure: {start: {learning_rate: 1e-5}}\n")
    supervised, main = make_plan(recipe)
    assert supervised.recipe.training["learning_rate"] == 1e-5
    assert supervised.recipe.loss[0].name == "sft"
    assert main.recipe.model.model_name_or_path == str(supervised.folder)
    assert main.recipe.model.use_peft


# Recipes that come with the package


def shipped() -> list[Path]:
    """Every YAML file below configs/, launch settings left out; counted here without the code under test."""
    folder = PACKAGE.parent / "configs"
    return sorted(file for file in folder.glob("**/*.yaml") if file.relative_to(folder).parts[0] != "accelerate")


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_shipped_recipes_load_and_come_back(file, tmp_path):
    recipe = load_recipe(file)
    recipe.dump(tmp_path / "dumped.yaml")
    assert load_recipe(tmp_path / "dumped.yaml") == recipe


def test_no_shipped_recipe_is_skipped():
    assert sorted(bundled_recipes().values()) == shipped()


def test_finding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text(BASE)
    assert find_recipe("mine") == Path("mine")
    assert recipe_text("mine") == BASE
    for name in ("../mine", "/etc/passwd/x", "a\0b", ".hidden", "x" * 300, "no such name", "mine.yaml"):
        with pytest.raises(RecipeError, match="there is no"):
            find_recipe(name)


def test_nearest_shipped_name(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    (folder / "accelerate").mkdir(parents=True)
    for name in ("tdpo2", "accelerate/ddp"):
        (folder / f"{name}.yaml").write_text(BASE)
    monkeypatch.setattr("prefopt.recipe.bundled.FOLDERS", (folder,))
    assert list(bundled_recipes()) == ["tdpo2"]
    assert load_recipe("tdpo2").output_dir == "runs/tdpo2"
    with pytest.raises(RecipeError, match="Did you mean `tdpo2`"):
        find_recipe("tdpo3")
    with pytest.raises(RecipeError, match="write its bare name"):
        find_recipe("tdpo2.yaml")
