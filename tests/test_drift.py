"""What must not change between the halves of a run has a name, and every change is listed under it."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.config import PreferenceConfig
from prefopt.drift import (
    FREE,
    as_facts,
    check_names,
    differences,
    digest,
    loss_facts,
    model_facts,
    refuse_drift,
    training_facts,
)
from prefopt.errors import UserError
from prefopt.losses import Objective
from tests.helpers import make_model

TOKEN = "hf_" + "a" * 30


def names(then, now) -> list[str]:
    return [difference.name for difference in differences(then, now)]


def facts(tmp_path, **settings):
    return training_facts(PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **settings))


def test_every_setting_is_a_fact_or_free(tmp_path):
    fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert fields > FREE
    assert set(facts(tmp_path)) == fields - FREE


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3}, {"num_train_epochs": 4}, {"max_steps": 7}, {"seed": 1}, {"max_grad_norm": 0.5},
        {"optim": "sgd"}, {"lr_scheduler_type": "cosine"}, {"warmup_steps": 3}, {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 2}, {"train_sampling_strategy": "random"}, {"max_length": 12},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500},
    ],
)  # fmt: skip
def test_what_decides_the_result_is_compared(tmp_path, change):
    assert next(iter(change)) in names(facts(tmp_path), facts(tmp_path, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 3}, {"save_steps": 3}, {"save_total_limit": 1}, {"eval_strategy": "steps", "eval_steps": 2},
        {"report_to": "none"}, {"run_name": "x"}, {"dataloader_num_workers": 2}, {"per_device_eval_batch_size": 1},
        {"hub_model_id": "a/b"}, {"hub_token": TOKEN}, {"activation_checkpointing": False}, {"self_check": False},
        {"resume": "never"}, {"allow_change": ["seed"]}, {"enable_jit_checkpoint": True},
    ],
)  # fmt: skip
def test_what_decides_nothing_is_not(tmp_path, change):
    assert names(facts(tmp_path), facts(tmp_path / "moved", **change)) == []


def test_facts_are_strict_json_without_secrets(tmp_path):
    found = facts(tmp_path, hub_token=TOKEN, lr_scheduler_kwargs={"api_key": "x", "low": float("inf"), "note": TOKEN})
    text = json.dumps(found, allow_nan=False)
    assert TOKEN not in text and "api_key" not in text
    assert json.loads(text) == found


def test_blocks_are_compared_field_by_field():
    then = {"loss": {"name": "dpo", "beta": 0.1}, "data": "x", "same": [1, 2]}
    now = {"loss": {"name": "dpo", "beta": 0.2}, "data": "x", "same": [1, 2], "world_size": 2}
    assert [each.text("the checkpoint") for each in differences(then, now)] == [
        "loss.beta: 0.1 in the checkpoint, 0.2 now",
        "world_size: nothing in the checkpoint, 2 now",
    ]
    several = {"loss": [{"name": "dpo"}, {"name": "sft"}]}
    assert names(then, several) == ["data", "loss.0.name", "loss.1.name", "loss.beta", "loss.name", "same"]


def test_a_setting_of_a_later_version_is_at_its_default_in_an_older_checkpoint():
    assert names({}, {"seed": 42, "learning_rate": 1e-6}) == []
    assert [each.text("it") for each in differences({}, {"seed": 43})] == ["seed: 42 in it, 43 now"]
    assert digest({}) == digest({"seed": 42}) != digest({"seed": 43})


def test_long_values_and_hashes_are_shortened():
    (change,) = differences({"data": "ab" * 32}, {"data": list(range(100))})
    text = change.text("it")
    assert text.startswith("data: abababababab... in it, [0, 1, 2,") and text.endswith("... now") and len(text) < 120


@pytest.mark.parametrize("allowed", [["loss.beta", "seed"], ["seed", "loss"]])
def test_what_is_allowed_by_name_or_by_block_passes(allowed):
    found = differences({"loss": {"beta": 1}, "seed": 1}, {"loss": {"beta": 2}, "seed": 2})
    refuse_drift(found, allowed, "runs/x", "the checkpoint")


@pytest.mark.parametrize("allowed", [[], ["seed"], ["loss.bet"], ["los"], ["loss.beta.x"]])
def test_what_is_not_allowed_is_listed(allowed):
    found = differences({"loss": {"beta": 1}, "seed": 1}, {"loss": {"beta": 2}, "seed": 2})
    with pytest.raises(UserError) as error:
        refuse_drift(found, allowed, "runs/x", "the checkpoint")
    assert "\n  loss.beta: 1 in the checkpoint, 2 now\n" in str(error.value)
    assert ("\n  seed: " in str(error.value)) == ("seed" not in allowed)


def test_what_cannot_be_allowed_is_not_offered():
    with pytest.raises(UserError, match=r"^[^[]*choose another output_dir$"):
        refuse_drift(differences({"a": 1}, {"a": 2}), None, "runs/x", "it")


OWN = {"loss": {"name": "dpo", "beta": 0.1}, "data": "x", "lora_r": 4}


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "world_size", "data", "loss", "loss.beta", "lora_r", "dataset_name", "reference", "logging_steps",
     "reference.model", "data.pairs.jsonl", "base"],
)  # fmt: skip
def test_every_name_of_a_recipe_may_be_allowed(name):
    check_names([name], OWN)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lerning_rate", "learning_rate"), ("loss.bta", "loss.beta"), ("word_size", "world_size"), ("beta", None)],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"allow_change: there is no setting `{name}`") as error:
        check_names(["seed", name], OWN)
    assert hint is None or f"Did you mean `{hint}`?" in str(error.value)


# ---- models and losses ------------------------------------------------------------------------------------------


def adapted(model, **config):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **config))


def test_a_full_model_is_its_class_and_shapes_since_its_weights_are_in_the_checkpoint():
    same, other = make_model(seed=0), make_model(seed=1)
    assert model_facts(same) == model_facts(other)
    assert names(model_facts(same), model_facts(make_model(num_hidden_layers=1))) == ["trainable"]


def test_an_adapter_is_its_configuration_and_the_model_below_it():
    first = model_facts(adapted(make_model(), r=4))
    assert first["adapter"] == "LORA" and (first["lora_r"], first["lora_target_modules"]) == (4, ["q_proj"])
    assert first == model_facts(adapted(make_model(), r=4))
    assert names(first, model_facts(adapted(make_model(), r=4, lora_alpha=3))) == ["lora_alpha"]
    assert names(first, model_facts(adapted(make_model(), r=8))) == ["lora_r", "trainable"]
    assert names(first, model_facts(adapted(make_model(seed=1), r=4))) == ["base"]


def test_a_base_that_was_trained_further_is_another_base():
    model = make_model()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.layers[1].mlp.down_proj.weight.add_(1e-6)
    assert names(model_facts(adapted(model)), model_facts(adapted(moved))) == ["base"]


def test_losses_are_named_as_in_a_recipe():
    one, two = loss_facts(Objective.of("dpo")), loss_facts(Objective.of(["dpo", "sft"], [1.0, 0.5]))
    assert one["loss"]["name"] == "dpo" and one["loss"]["beta"] == 0.1 and one["loss_weights"] == [1.0]
    assert [loss["name"] for loss in two["loss"]] == ["dpo", "sft"] and two["loss_weights"] == [1.0, 0.5]
    assert as_facts(one) == one
