"""Every known mistake gets one line: place, setting, reason, remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.kto import KTOConfig

from prefopt.config import PreferenceConfig
from prefopt.errors import RecipeError
from prefopt.losses.elsewhere import IN_TRL
from prefopt.recipe import ReferenceSection, load_recipe
from prefopt.recipe.loss_block import knob_names
from prefopt.recipe.read import known_names, training_types
from prefopt.recipe.renamed import NOTES, RENAMED, RETIRED
from tests.recipe.mistakes import BASE, Mistake, mistake_table


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function: recipe text and options -> the refusal."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *options: str) -> str:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError) as refusal:
            load_recipe("recipe.yaml", options)
        return str(refusal.value)

    return run


@pytest.mark.parametrize("mistake", mistake_table(), ids=lambda mistake: mistake.title)
def test_answer(refused, mistake: Mistake):
    assert refused(mistake.recipe if mistake.new else BASE, *mistake.options) == mistake.answer


def test_the_base_is_fine(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    assert load_recipe(file).training == {"learning_rate": 5e-6, "max_length": 1024}


def test_all_problems_at_once_in_the_order_of_the_file(refused):
    text = BASE.replace("beta: 0.1", "beta: -1") + "seed: x\nwarmup_ratio: 0.1\n"
    lines = refused(text, "--bf16", "maybe").splitlines()
    starts = ["recipe.yaml:5: loss.beta:", "recipe.yaml:8: seed:", "recipe.yaml:9: warmup_ratio:", "--bf16:"]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ("model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct\n", "model_name_or_path"),
        ("data_files: [pairs.jsonl]\n", "dataset_name"),
        ("loss:\n  name: dpo\n  beta: 0.1\n", "loss"),
    ],
)
def test_what_must_be_there(refused, missing, name):
    assert refused(BASE.replace(missing, "")).startswith(f"recipe.yaml: {name}: is missing. Write ")


@pytest.mark.parametrize("name", sorted({*RENAMED, *RETIRED}))
def test_older_names_say_what_to_write(refused, name):
    answer = refused(f"{BASE}{name}: 3\n")
    assert answer.startswith(f"recipe.yaml:8: {name}: ")
    assert "there is no such setting" not in answer


def test_older_names_lead_to_names_there_are():
    assert len({*RENAMED, *RETIRED}) >= 25
    assert {*NOTES} <= {*RENAMED}
    assert not {*RENAMED, *RETIRED} & {*known_names()}
    for new in RENAMED.values():
        block, _, inner = new.partition(".")
        assert new in known_names() or (block == "reference" and inner in vars(ReferenceSection()))


def test_every_setting_of_trls_trainers_is_read_or_has_an_answer(refused):
    """Those of the loss are knobs here, or have a line that says what to write."""
    theirs = {field.name for config in (DPOConfig, KTOConfig, CPOConfig) for field in dataclasses.fields(config)}
    theirs -= {field.name for field in dataclasses.fields(TrainingArguments)}
    answered = {*RENAMED, *RETIRED, *known_names(), "loss_type", *knob_names()}
    assert theirs <= answered, theirs - answered
    assert "alpha = 1 - this number" in refused(f"{BASE}f_alpha_divergence_coef: 0.3\n")
    assert "loss: {name: simpo, gamma: ...}" in refused(f"{BASE}simpo_gamma: 0.5\n")


def test_every_training_setting_is_either_read_or_explained():
    fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert fields == {*training_types(), *fields & {*RENAMED, *RETIRED}, "loss_weights", "reference"}


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid"]])
def test_loss_type(refused, loss_type):
    assert refused(f"{BASE}loss_type: {loss_type}\n").endswith("write loss: {name: dpo}.")
    assert IN_TRL["robust"] == "rdpo"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("loss: dpo", "Write loss: {name: dpo}."),
        ("loss: []", "the list is empty"),
        ("loss: [dpo]", "loss.0: expected a block"),
        ("loss: {beta: 0.1}", "`name` is missing"),
        ("loss: {name: dppo}", "loss.name: there is no loss `dppo`. Did you mean `dpo`?"),
        ("loss: {name: sdpo}", "three methods"),
        ("loss: {name: dpo, weight: 2}", "Write loss_weights"),
        ("loss: [{name: dpo}, {name: dpo}]", "twice"),
        ("loss: [{name: dpo}, {name: sft}]\nloss_weights: [1]", "has 1 numbers, but there are 2 losses"),
        ("loss: [{name: dpo}, {name: sft}]\nloss_weights: [1, -1]", "every weight must be at least 0, not -1"),
        ("loss: [{name: dpo}, {name: sft}]\nloss_weights: [0, 0]", "at least one weight must be above 0"),
        ("loss: [{name: dpo}, {name: sft}]\nloss_weights: [a, 1]", "loss_weights.0: expected a number, got `a`"),
    ],
)
def test_loss_block(refused, line, part):
    assert part in refused(BASE.replace("loss:\n  name: dpo\n  beta: 0.1", line))


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ("data_files: {train: a, dev: b}", "data_files.dev: a block of files has train and test"),
        ("data_files: {test: a}", "`train` is missing"),
        ("data_files: {train: a, test: b}\ntest_split_size: 0.1", "contradicts the test files"),
        ("data_files: a\ntest_split_size: 1.5", "must be a share below 1 or a whole number of rows"),
        ("data_files: a\ntest_split_size: 0", "must be above 0"),
        ("data_files: a\ndataset_test_split: b", "has no effect without dataset_name"),
        ("datasets: [{path: a}]\ndata_files: b", "contradicts datasets"),
        (
            "datasets: [{path: a, fracton: 0.5}]",
            "datasets.0.fracton: there is no such setting. Did you mean `fraction`?",
        ),
        ("datasets: [{path: a, fraction: 2}]", "datasets.0.fraction: must be above 0 and at most 1, not 2."),
        ("datasets: [{name: a}]", "datasets.0: `path` is missing"),
        ("datasets: a", "expected a list"),
        ("data_files: a\nprocedure: {start: 5}", "procedure.start: expected a block of settings"),
        ("data_files: a\nprocedure: {start: {output_dir: b}}", "procedure.start.output_dir: the start has a folder"),
        ("data_files: a\nmax_bad_rows: 3", "Write on_bad_row: skip"),
        ("data_files: a\ncolumn_names: [prompt]", "expected a block of `name: value` or null, got a list"),
    ],
)
def test_data(refused, lines, part):
    assert part in refused(BASE.replace("data_files: [pairs.jsonl]", lines))


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (
            "model_name_or_path: a\nprocedure:\n  start:\n    epochs: 3",
            "recipe.yaml:4: epochs: there is no such setting",
        ),
        ("from_scratch: {hidden_size: 3}", "`model_type` is missing"),
        ("from_scratch: {model_type: lama}", "Did you mean `llama`?"),
        ("from_scratch: {model_type: llama, hidden_size: big}", "transformers refuses these fields"),
        ("model_name_or_path: a\nfrom_scratch: {model_type: llama}", "contradicts from_scratch"),
        ("model_name_or_path: a\nuse_peft: true\nload_in_4bit: true\nload_in_8bit: true", "contradicts load_in_4bit"),
        ("model_name_or_path: a\ndtype: fp16", "dtype: `fp16` is not one of auto, bfloat16, float16, float32"),
        (
            "model_name_or_path: a\nuse_peft: true\nlora_dropout: 1",
            "lora_dropout: must be at least 0 and below 1, not 1.",
        ),
    ],
)
def test_model(refused, lines, part):
    assert part in refused(BASE.replace("model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct", lines))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("reference: {modell: a}", "reference.modell: there is no such setting. Did you mean `model`?"),
        ("reference: {source: cahced}", "reference.source: `cahced` is not one of"),
        ("reference: {revision: a}", "has no effect without reference.model"),
        ("reference: a", "expected a block"),
        ("reference: {sync_steps: 0}", "reference.sync_steps: must be at least 1, not 0"),
        ("reference: {sync_steps: 2.5}", "reference.sync_steps: expected a whole number"),
        ("reference: {sync_steps: 8, mixup_alpha: 0}", "reference.mixup_alpha: must be above 0 and at most 1, not 0"),
        ("reference: {sync_steps: 8, mixup_alpha: 1.1}", "must be above 0 and at most 1, not 1.1"),
        ("reference: {mixup_alpha: 0.5}", "reference.mixup_alpha: has no effect without sync_steps. Write"),
        ("reference: {sync_steps: 8, source: cached}", "reference.source: cached keeps the scores of one reference"),
        ("reference: {sync_steps: 8, source: none}", "reference.source: none and sync_steps contradict each other"),
        (
            "reference: {sync_steps: 8}\nload_best_model_at_end: true",
            "reference.sync_steps: makes figures of different steps distances from different references, so `loss`",
        ),
        ("sync_ref_model: true", "sync_ref_model: write reference: {sync_steps: 512, mixup_alpha: 0.6}"),
        ("ref_model_sync_steps: 64", "write reference.sync_steps: 64. It stands for sync_ref_model: true as well."),
        ("ref_model_mixup_alpha: 0.9", "write reference.mixup_alpha: 0.9. It is read beside reference.sync_steps."),
        ("procedure: spin", "expected a block"),
        ("remove_unused_columns: true", "stays false here"),
        ("label_smoothing_factor: 0.1", "stays 0 here"),
        ("accelerator_config: {dispatch_batches: true}", "dispatch_batches would cut"),
        ("loss.beta: 0.2", "Write a block: loss: {beta: 0.2}."),
        ("learning-rate: 1", "Did you mean `learning_rate`?"),
        ("betta: 1", "Did you mean `loss.beta`?"),
        ("qqq: 1", "qqq: there is no such setting."),
        ("lr: 1", "write learning_rate: 1."),
        ("optim: adamw_torh", "Did you mean `adamw_torch`?"),
    ],
)
def test_other_blocks(refused, line, part):
    assert part in refused(f"{BASE}{line}\n")
