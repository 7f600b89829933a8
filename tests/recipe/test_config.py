"""`PreferenceConfig`: TRL's defaults, refusals by field name, and no token in what is written."""

from __future__ import annotations

import io
import math
import pickle
import typing
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig

from prefopt.config import DEFAULTS_SHOWN, PreferenceConfig, shown_defaults
from prefopt.errors import RecipeError, UserError
from prefopt.recipe import ModelSection, load_recipe
from prefopt.recipe.sections import DataSection, DatasetEntry
from prefopt.settings import CHOICES, FIXED, RANGES, field_problem
from tests.recipe.mistakes import BASE

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"

HINTS = {name: hint for name, hint in typing.get_type_hints(PreferenceConfig).items() if not name.startswith("_")}
NUMBERS = {
    name: hint
    for name, hint in HINTS.items()
    if {int, float} & {hint, *typing.get_args(hint)} and name in PreferenceConfig.__dataclass_fields__
}


def config(tmp_path: Path, **settings: object) -> PreferenceConfig:
    return PreferenceConfig(output_dir=str(tmp_path), **{"use_cpu": True, **settings})


def test_every_number_has_a_range():
    assert set(RANGES) == set(NUMBERS)
    for name, hint in NUMBERS.items():
        assert RANGES[name].whole == (float not in {hint, *typing.get_args(hint)}), name


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_numbers_in_python(tmp_path, name):
    low = RANGES[name].low
    for wrong in (math.nan, math.inf, -math.inf, "1e-6", True, low - 1.5, 10**400):
        with pytest.raises(UserError, match=rf"^{name}: (must be|stays)"):
            config(tmp_path, **{name: wrong})


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"local_rank"}))
@pytest.mark.parametrize("written", [".nan", "-.inf", "1e400", "-2", "-1e-3", "true", "'1'", "[1]"])
def test_numbers_in_a_recipe(tmp_path, name, written):
    file = tmp_path / "recipe.yaml"
    text = "\n".join(line for line in BASE.splitlines() if not line.startswith(f"{name}:"))
    file.write_text(f"{text}\n{name}: {written}\n")
    with pytest.raises(RecipeError, match=rf"recipe.yaml:\d: {name}: "):
        load_recipe(file)


@pytest.mark.parametrize("section", [ModelSection, DataSection, DatasetEntry])
def test_numbers_of_the_sections_have_a_range(section):
    hints = typing.get_type_hints(section)
    for name, field in section.__dataclass_fields__.items():
        if {int, float} & {hints[name], *typing.get_args(hints[name])}:
            assert field.metadata["range"] is not None, name


def test_limits_themselves(tmp_path):
    for name, settings in RANGES.items():
        assert (field_problem(name, int(settings.low)) is None) == (not settings.above_low), name
    assert config(tmp_path, max_steps=-1).max_steps == -1
    assert config(tmp_path, learning_rate=0).learning_rate == 0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches would cut"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches would cut"),
        ({"remove_unused_columns": True}, "remove_unused_columns: stays false"),
        ({"label_smoothing_factor": 0.1}, "no effect on a preference loss"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: stays true"),
        ({"train_sampling_strategy": "batch_rebalance"}, "is not one of random"),
        ({"truncation_mode": "keep_sart"}, "Did you mean `keep_start`"),
        ({"loss_weights": []}, "loss_weights: must be a list"),
        ({"loss_weights": [math.nan]}, "loss_weights: every weight must be a finite"),
        ({"reference": {"model": "a", "source": "none"}}, "contradict each other"),
        ({"reference": {"modell": "a"}}, "Did you mean `model`"),
        ({"reference": {"source": "cache"}}, "reference: source `cache` is not one of"),
        ({"lr_scheduler_type": "cosin"}, "training settings: "),
        ({"load_best_model_at_end": True}, "training settings: "),
    ],
)
def test_refusals(tmp_path, settings, part):
    with pytest.raises(UserError) as refusal:
        config(tmp_path, **settings)
    assert part in str(refusal.value)


def test_a_settings_file_cannot_bring_dispatch_in(tmp_path):
    file = tmp_path / "accelerator.json"
    file.write_text('{"dispatch_batches": true}')
    with pytest.raises(UserError, match="accelerator_config: dispatch_batches"):
        config(tmp_path, accelerator_config=str(file))


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match="accelerate launch"):
        config(tmp_path)


def test_defaults_are_those_of_trl(tmp_path):
    ours, theirs = config(tmp_path), DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    same = (
        "learning_rate",
        "logging_steps",
        "max_length",
        "truncation_mode",
        "disable_dropout",
        "activation_checkpointing",
    )
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert (ours.train_sampling_strategy, ours.logging_nan_inf_filter) == ("group_by_length", False)
    assert (ours.remove_unused_columns, ours.ddp_find_unused_parameters, ours.report_to) == (False, False, [])
    assert config(tmp_path, gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize(
    ("gpu", "settings", "expected"), [(True, {}, True), (True, {"fp16": True}, False), (False, {}, False)]
)
def test_bf16_where_the_device_has_it(tmp_path, monkeypatch, gpu, settings, expected):
    for module in ("prefopt.config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: gpu)
    monkeypatch.setattr("prefopt.config.has_accelerator", lambda: gpu)
    assert PreferenceConfig(output_dir=str(tmp_path), **settings).bf16 is expected
    assert PreferenceConfig(output_dir=str(tmp_path), **settings, bf16=False).bf16 is False


def test_shown_defaults_are_settings_of_ours():
    assert set(DEFAULTS_SHOWN) <= set(HINTS)
    assert list(shown_defaults()) == list(DEFAULTS_SHOWN)
    assert set(CHOICES) <= set(HINTS) and set(FIXED) <= set(HINTS)
    for name in PreferenceConfig.__annotations__:
        assert PreferenceConfig.__dataclass_fields__[name].metadata["help"]


def test_the_token_stays_in_memory(tmp_path):
    arguments = config(tmp_path, hub_token=TOKEN)
    saved = io.BytesIO()
    torch.save(arguments, saved)
    written = [
        pickle.dumps(arguments),
        saved.getvalue(),
        arguments.to_json_string().encode(),
        f"{arguments!r} {arguments}".encode(),
    ]
    assert not [text for text in written if TOKEN.encode() in text]
    assert arguments.hub_token == TOKEN
    assert pickle.loads(written[0]).learning_rate == arguments.learning_rate


def test_the_token_of_the_environment_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    recipe = load_recipe(file)
    recipe.dump(tmp_path / "dumped.yaml")
    assert TOKEN not in (tmp_path / "dumped.yaml").read_text() + repr(recipe) + str(
        recipe.training_arguments(hub_token=TOKEN)
    )


def test_trl_style_command_lines_still_parse(tmp_path):
    (arguments,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--max_length", "64", "--use_cpu", "true"]
    )
    assert arguments.max_length == 64
