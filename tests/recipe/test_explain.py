"""`explain` counts what can be counted, and calls the rest an estimate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from prefopt.errors import RecipeError
from prefopt.explain import count_rows, explain, measure_model, memory_parts
from prefopt.forecast import Sizes, reference_bytes, reference_plan
from prefopt.models import adapter_config
from prefopt.procedures import make_plan
from prefopt.recipe import Recipe, load_recipe
from tests import helpers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer and 50 pairs."""
    folder = tmp_path_factory.mktemp("explain")
    tokenizer = helpers.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    helpers.make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    rows = helpers.text_pairs(50)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder}/model\ndata_files: {folder}/pairs.jsonl\nloss: {{name: dpo}}\n"
    )
    return folder


@pytest.fixture
def load(folder):
    """A function: options -> recipe."""

    def run(*options: str) -> Recipe:
        return load_recipe(folder / "recipe.yaml", options)

    return run


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_steps(load):
    text = explain(load("--gradient_accumulation_steps=2", "--num_train_epochs=1.5"), world_size=2)
    assert "32 = 8 a device x 2 accumulated x devices: 2" in line(text, "effective batch")
    assert line(text, "steps").endswith("2 an epoch, 3 in all (epochs: 1.5)")
    assert line(explain(load("--max_steps=9")), "steps").endswith("9 (max_steps)")


def test_a_run_of_one_step_with_warm_up_is_told(load):
    one = ("--per_device_train_batch_size=64", "--num_train_epochs=1")
    assert "its learning rate is 0, so nothing is learnt" in explain(load(*one, "--warmup_steps=0.1"))
    assert "nothing is learnt" not in explain(load(*one)) + explain(load("--warmup_steps=0.1"))


def test_columns_that_a_loss_cannot_do_without_are_missed(load):
    text = explain(load("--loss.name=odpo"))
    assert "The data is refused: " in text and "pairs.jsonl:1: `odpo` reads the scores of both answers" in text
    assert "40 to train on, 10 to evaluate on" in line(explain(load("--test_split_size=0.2")), "rows")


def test_lengths_are_counted_with_the_tokenizer(load):
    rows = count_rows(load())
    tokenizer = helpers.make_tokenizer()

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    expected = [
        2 * length(row["prompt"]) + length(row["chosen"]) + length(row["rejected"]) + 2
        for row in helpers.text_pairs(50)
    ]
    assert rows.train == 50
    assert rows.tokens == pytest.approx(sum(expected) / 50)


def test_without_a_tokenizer_lengths_are_called_estimates(load):
    assert "estimates" in count_rows(load("--tokenizer_name_or_path", "nobody/nothing")).note


def test_what_cannot_be_opened_is_said(load, folder):
    (folder / "bad.jsonl").write_text('{"prompt": 3}\n')
    text = explain(load("--data_files", f"{folder}/bad.jsonl", "--model_name_or_path", "nobody/nothing"))
    assert "The data is refused: " in text and "bad.jsonl:1" in text
    assert "not estimated: the configuration of `nobody/nothing` cannot be read." in text
    assert "not on this machine" in count_rows(load("--data_files=null", "--dataset_name=nobody/nothing")).note


def test_reference_plan(load):
    assert reference_plan(load("--loss.name=sft")).startswith("none")
    assert reference_plan(load()).startswith("the starting model. Each answer is scored once")
    assert "kept in elsewhere" in reference_plan(load("--reference.store=elsewhere"))
    assert "switched off" in reference_plan(load("--use_peft"))
    assert reference_plan(load("--reference.model=other")).startswith("other")
    assert reference_plan(load("--reference.source=live")).endswith("A second model is held for it.")
    assert reference_plan(load("--reference.source=live", "--use_peft")).endswith("No second model is held.")


def test_a_reference_that_moves_is_forecast(load):
    moves = "It follows the policy, moving: every 64 steps, alpha 0.6. It is scored beside the policy at every step."
    full, adapter = load("--reference.sync_steps=64"), load("--reference.sync_steps=64", "--use_peft")
    assert (
        reference_plan(full)
        == f"the starting model. {moves} A second model is held for it, and kept in every checkpoint."
    )
    assert f"the policy with a copy of its adapter. {moves} A copy of the adapter is held" in reference_plan(adapter)
    single, half = Sizes(10**9, 10**9, 4, 24, 1000), Sizes(10**9, 10**9, 2, 24, 1000)
    assert reference_bytes(full, 1e4, single) == 4 * 10**9
    assert reference_bytes(full, 1e4, half) == (2 + 4) * 10**9  # with its average
    copies = load("--reference.sync_steps=64", "--reference.mixup_alpha=1")
    assert reference_bytes(copies, 1e4, half) == 2 * 10**9
    assert reference_bytes(adapter, 1e4, Sizes(10**9, 10**6, 2, 24, 1000)) == 4 * 10**6


def test_whole_distributions_are_forecast(load):
    sizes = Sizes(10**9, 10**9, 2, 24, 1000, 50_000)
    full, adapter = load("--loss.name=tdpo2"), load("--loss.name=tdpo2", "--use_peft")
    assert "hidden states, with a copy of the head, at most 20.0 MB" in reference_plan(full, 1e4, sizes)
    assert reference_bytes(full, 1e4, sizes) == 2 * 50_000 * 1000
    assert "expected rows of its head, at most 40.1 MB" in reference_plan(adapter, 1e4, sizes)
    assert reference_bytes(adapter, 1e4, sizes) == 0
    assert "beside the policy at every step. Keeping it would take 4.0 GB. A second" in reference_plan(full, 2e6, sizes)
    assert reference_bytes(full, 2e6, sizes) == 2 * 10**9
    assert reference_bytes(load("--loss.name=tdpo2", "--reference.source=cached"), 2e6, sizes) == 2 * 50_000 * 1000
    assert reference_bytes(load("--reference.source=live"), 1e4, sizes) == 2 * 10**9
    assert reference_bytes(load(), 1e4, sizes) == 0
    assert "not known here" in reference_plan(full)


def test_weights_are_counted_without_loading_any(load, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert measure_model(load().model) == Sizes(count, count, 4, 2, 32, model.config.vocab_size)
    section = load("--use_peft", "--lora_target_modules=all-linear", "--lora_r=4", "--dtype=bfloat16").model
    model.add_adapter(adapter_config(section))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert measure_model(section) == Sizes(count, trainable, 2, 2, 32, model.config.vocab_size)
    assert measure_model(load("--load_in_4bit", "--use_peft").model).width == 0.5
    scratch = load(
        "--model_name_or_path=null",
        "--from_scratch={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, vocab_size: 99}",
    )
    assert measure_model(scratch.model).hidden == 32


def test_memory(load):
    settings = {**load().resolved(), "bf16": False}
    full = memory_parts(Sizes(1000, 1000, 4, 2, 32), settings, 10, reference=4000)
    assert (full["weights"], full["gradients"], full["optimizer"], full["reference"]) == (4000, 4000, 8000, 4000)
    assert full["in all"] == sum(value for name, value in full.items() if name != "in all")
    adapter = memory_parts(Sizes(1000, 100, 2, 2, 32), settings, 10, reference=0)
    assert (adapter["weights"], adapter["gradients"], adapter["optimizer"], adapter["reference"]) == (2400, 400, 800, 0)
    whole = memory_parts(Sizes(1000, 1000, 4, 20, 32), {**settings, "activation_checkpointing": False}, 10, reference=0)
    kept = memory_parts(Sizes(1000, 1000, 4, 20, 32), settings, 10, reference=0)
    assert whole["activations"] > 3 * kept["activations"]
    assert memory_parts(Sizes(1000, 1000, 4, 2, 32), {**settings, "optim": "sgd"}, 10, reference=0)["optimizer"] == 0


def test_the_stages_of_a_run_are_listed(load):
    assert "Stages" not in explain(load())
    text = explain(load("--procedure.start.num_train_epochs", "2", "--output_dir", "runs/x"))
    assert line(text, "1. ") == "1. start (sft, epochs: 2): runs/x/start"
    assert line(text, "2. ") == "2. train (dpo, epochs: 3): runs/x"
    assert text.count("cost: 50 rows, steps: 7 an epoch, 14 in all") == 1
    assert "settings: DPO(beta=0.1), learning_rate 1e-06" in text
    with pytest.raises(RecipeError, match=r"procedure\.strat: not read"):
        explain(load("--procedure.strat", "2"))


def test_what_an_earlier_stage_makes_is_not_known_before(load, tmp_path):
    options = ("--procedure", "{name: stepwise, chunks: 2}", "--output_dir", str(tmp_path))
    text = explain(load(*options))
    assert line(text, "   makes: ") == (
        "   makes: 2 equal chunks, easy to hard, found by one forward pass of the start model over all rows"
    )
    assert text.count("cost: known when the stages before it have made the data") == 2
    assert f"model: {tmp_path}/step-1" in text and f"data: {tmp_path}/chunks/chunk-2.jsonl" in text


@pytest.mark.parametrize("name", ["spin", "online", "stepwise", "quickstart"])
def test_every_stage_of_the_shipped_runs_says_what_it_makes_or_costs(name):
    text = explain(load_recipe(name))
    told = text.split("\nStages\n")[1].split("\n\n")[0]
    stages = re.split(r"^\d+\. ", told, flags=re.MULTILINE)[1:]
    assert len(stages) == len(make_plan(load_recipe(name)))
    assert all("\n   makes: " in stage or "\n   cost: " in stage for stage in stages)
    assert ("Rows and steps" not in text and "of each stage the model it starts from" in text) or name == "quickstart"


def test_the_rounds_of_spin_are_counted_before_anything_is_made():
    """1,500 pairs in the first round and twice as many later, two epochs of sixteen each."""
    text = explain(load_recipe("spin"))
    first, *later = re.findall(r"cost: at most (\d+) rows, steps: .* (\d+) in all", text)[1:]
    assert (first, set(later)) == (("1500", "188"), {("3000", "376")})


def test_settings_that_no_stage_has_are_not_shown_as_the_recipes():
    """The rounds have a rate and epochs of their own, and a beta."""
    shown = yaml.safe_load(explain(load_recipe("spin")).split("\n\nLosses")[0].split("---\n")[1])
    assert shown["loss"] == {"name": "dpo"}
    assert not {"learning_rate", "num_train_epochs"} & set(shown)
    assert shown["warmup_steps"] == 0.1
