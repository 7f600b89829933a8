"""Procedures that stand in the small world: its texts before their stages, and a comparison after them."""

from __future__ import annotations

import json

import pytest

from prefopt.errors import RecipeError, UserError
from prefopt.procedures import make_plan, run_plan
from prefopt.recipe import load_recipe
from prefopt.world.stages import held_out_prompts, training_prompts
from tests.procedures.spinning import rows_of

MODEL = (
    "{model_type: llama, vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, "
    "num_attention_heads: 2}"
)
RECIPE = """\
from_scratch: {model}
loss: {{name: dpo}}
procedure:
  name: {name}
  rounds: 1
  prompts: 12
  max_new_tokens: 24
  learning_rate: 1.0e-3
  num_train_epochs: 1
  measure: {{kindness: {{world: reward}}, grammatical: {{world: grammatical}}}}
  world: {{texts: 120, eval_prompts: 4}}
  start: {{learning_rate: 4.0e-3, num_train_epochs: 1, eval_strategy: "no"}}
  {more}
output_dir: {folder}/run
max_length: 96
report_to: none
disable_tqdm: true
self_check: false
save_strategy: "no"
use_cpu: true
"""
JUDGE = "judge: {world: reward}"


def recipe_in(folder, name: str, more: str = "", *options: str):
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=MODEL, name=name, more=more, folder=folder))
    return load_recipe(file, options)


def names(recipe) -> list[str]:
    return [stage.name for stage in make_plan(recipe)]


def test_the_rounds_of_spin_stand_between_the_worlds_texts_and_its_comparison(tmp_path):
    rounds = ["answers-0", "measured-0", "pairs-0", "train-0", "answers-1", "measured-1"]
    assert names(recipe_in(tmp_path, "spin")) == ["texts", "data", "start", *rounds, "report", "compare"]


def test_the_rounds_of_online_stand_there_as_well(tmp_path):
    rounds = ["answers-0", "judged-0", "measured-0", "pairs-0", "train-0", "answers-1", "judged-1", "measured-1"]
    assert names(recipe_in(tmp_path, "online", JUDGE)) == ["texts", "data", "start", *rounds, "report", "compare"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--procedure.world", "{texts: 10, pairs_per_prompt: 2}"),
            r"world\.pairs_per_prompt: not known.*Known: texts,",
        ),
        (("--procedure.world", "[texts]"), r"world: expected a block of sizes"),
        (("--data_files", "mine.jsonl"), r"world: makes its own data"),
        (("--procedure.start", "null", "--from_scratch", "null", "--model_name_or_path", "m"), "start: is missing"),
        (("--procedure.measure", "{kindness: {word: reward}}"), r"measure\.kindness: needs one of function"),
        (("--procedure.measure", "[kindness]"), r"measure: must be judges by name"),
        (("--procedure.measure", "{../kindness: {world: reward}}"), r"measure: must be judges by name"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, options, said):
    if options[0] == "--procedure.start":
        block = {name: value for name, value in recipe_in(tmp_path, "spin").procedure.items() if name != "start"}
        options = ("--procedure", json.dumps(block), *options[2:])
    with pytest.raises(RecipeError, match=said):
        make_plan(recipe_in(tmp_path, "spin", "", *options))


def test_something_to_measure_needs_held_out_rows(tmp_path):
    block = {"name": "spin", "measure": {"kindness": {"world": "reward"}}}
    own = {"from_scratch": None, "model_name_or_path": "m", "data_files": "mine.jsonl", "procedure": block}
    with pytest.raises(RecipeError, match=r"procedure\.measure: needs held-out rows"):
        make_plan(recipe_in(tmp_path, "spin").replace(own))


def test_a_judge_that_only_measures_is_looked_at_before_anything_is_sampled(tmp_path):
    measure = ("--procedure.measure", "{kindness: {function: nowhere.py:kindness}}")
    for name, more in (("spin", ""), ("online", JUDGE)):
        plan = make_plan(recipe_in(tmp_path, name, more, *measure, "--output_dir", str(tmp_path / name)))
        with pytest.raises(UserError, match="a recipe alone never imports code"):
            run_plan(plan[:2])


def run(recipe, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])
        result = run_plan(make_plan(recipe))
    return folder / "run", result


def test_spin_runs_from_the_worlds_texts_to_its_comparison(tmp_path, capsys):
    folder, result = run(recipe_in(tmp_path, "spin"), tmp_path)
    assert "gain in true reward" in capsys.readouterr().out
    assert result == json.loads((folder / "world" / "comparison.json").read_text())
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-5) and result["after"]["kl"] > 1e-4
    texts = [row["completion"] for row in rows_of(folder / "world" / "texts.jsonl")]
    pairs = rows_of(folder / "round-0" / "pairs" / "pairs.jsonl")
    assert pairs and all(row["chosen"] in texts and row["rejected"] not in texts for row in pairs)
    evaluated = [row["prompt"] for row in rows_of(folder / "data" / "test.jsonl")]
    assert evaluated == held_out_prompts()[:4]
    rows = json.loads((folder / "results.json").read_text())["rounds"]
    assert [set(row) >= {"measured/kindness", "measured/grammatical"} for row in rows] == [True, True]
    assert load_recipe(folder / "report" / "recipe.yaml") == recipe_in(tmp_path, "spin")


@pytest.mark.slow
def test_online_runs_on_the_worlds_openings_and_its_reward(tmp_path):
    longer = ("--procedure.world", "{texts: 600, eval_prompts: 4}", "--procedure.max_new_tokens", "72")
    folder, result = run(recipe_in(tmp_path, "online", JUDGE, *longer), tmp_path)
    assert result["after"]["kl"] > 1e-5
    asked = {row["prompt"] for row in rows_of(folder / "data" / "train.jsonl")}
    evaluated = {row["prompt"] for row in rows_of(folder / "data" / "test.jsonl")}
    assert asked <= set(training_prompts()) and evaluated == set(held_out_prompts()[:4])
    pairs = rows_of(folder / "round-0" / "pairs" / "pairs.jsonl")
    assert pairs and all(row["score_chosen"] > row["score_rejected"] for row in pairs)
