"""`prefopt explain RECIPE`: what a run will do, told before any weights are loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from prefopt.checks import IDLE
from prefopt.counting import Rows, count_rows
from prefopt.errors import UserError
from prefopt.forecast import Sizes, reference_bytes, reference_plan
from prefopt.losses.pages import needs_summary
from prefopt.losses.trial import try_losses
from prefopt.models import adapter_config, model_config
from prefopt.procedures import Stage, TrainStage, make_plan
from prefopt.recipe import ModelSection, Recipe
from prefopt.recipe.write import to_yaml

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Numbers an optimizer keeps for each trained weight; those not named keep two, as Adam does.
STATES = {"adamw": 2.0, "adam": 2.0, "sgd": 0.0, "adafactor": 0.05, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0}
# Bytes a transformer layer keeps per token and hidden unit at 16 bits without attention matrices, Korthikanti et al.
# 2022 (arXiv 2205.05198), eq. 1.
LAYER_BYTES = 34


def explain(recipe: Recipe, *, world_size: int | None = None) -> str:
    """A page of text: the resolved recipe, rows and steps, the reference, and memory by part.

    `world_size`: devices of the run; the launcher's, or 1, when not given. Rows are counted from local files; nothing
    is downloaded but the model's configuration. What is estimated is called an estimate.
    """
    devices = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    try_losses(recipe.objective().losses)
    settings, plan = recipe.resolved(), make_plan(recipe)
    trained = [stage.recipe for stage in plan if isinstance(stage, TrainStage)]
    rows = count_rows(recipe)
    sizes = _sizes(recipe)
    sections = {
        f"Recipe {recipe.name}, with its defaults": to_yaml(_of_the_recipe(recipe, trained)).rstrip(),
        "Losses": "\n".join(f"{loss.name}: {needs_summary(loss.needs)}" for loss in recipe.objective().losses),
        **({"Stages": _stages(plan, devices)} if len(plan) > 1 else {}),
        **({"Rows and steps": _steps(settings, rows, devices)} if len(trained) == 1 else {"Rows": _rows(rows)}),
        "Reference": reference_plan(recipe, rows.kept, sizes, of_stages=len(trained) > 1),
        "Memory of one device, nothing sharded (estimate)": _memory(recipe, settings, rows, sizes),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items()) + "\n"


def _of_the_recipe(recipe: Recipe, trained: Sequence[Recipe]) -> dict[str, Any]:
    """The recipe in full, without defaults that hold in none of its stages: each says there what it has instead."""
    settings, stages = recipe.resolved(), [each.resolved() for each in trained]
    for name in ("learning_rate", "num_train_epochs", "loss"):
        if all(stage[name] != settings[name] for stage in stages):
            written = recipe.as_written()
            settings = {**settings, name: written[name]} if name in written else _without(settings, name)
    return settings


def _without(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def _stages(plan: Sequence[Stage], devices: int) -> str:
    """The stages of a run that has several; what follows them on the page is about the recipe as a whole."""
    lines = []
    for number, stage in enumerate(plan, start=1):
        about = _training(stage, devices) if isinstance(stage, TrainStage) else {"makes": stage.summary}
        lines.append(f"{number}. {stage.name}{_kind(stage)}: {stage.folder}")
        lines += [f"   {name}: {text}" for name, text in about.items() if text]
    return "\n".join(lines)


def _kind(stage: Stage) -> str:
    if not isinstance(stage, TrainStage):
        return ""
    epochs = stage.recipe.resolved()["num_train_epochs"]
    return f" ({' + '.join(loss.name for loss in stage.recipe.loss)}, epochs: {epochs:g})"


def _training(stage: TrainStage, devices: int) -> dict[str, str]:
    """Model, data, settings and cost of a stage; what an earlier one makes is not known before it has run."""
    recipe, settings = stage.recipe, stage.recipe.resolved()
    files = recipe.data.data_files
    named = files.get("train") if isinstance(files, dict) else files
    listed = recipe.data.dataset_name or named or [entry.path or entry.data_files for entry in recipe.data.datasets]
    return {
        "model": recipe.model.model_name_or_path or "from scratch",
        "data": listed if isinstance(listed, str) else ", ".join(map(str, listed)),
        "settings": ", ".join([*map(repr, recipe.objective().losses), f"learning_rate {settings['learning_rate']:g}"]),
        "cost": _cost(stage, settings, devices),
    }


def _cost(stage: TrainStage, settings: dict[str, Any], devices: int) -> str:
    recipe = stage.recipe
    effective = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * devices
    if recipe.data.data_files and not recipe.data.local_files():
        if stage.most_rows is None:
            return "known when the stages before it have made the data"
        steps, *_ = _step_count(settings, stage.most_rows, effective).split("\n")
        return f"at most {stage.most_rows} rows, steps: {steps}"
    rows = count_rows(recipe)
    if rows.train is None:
        return rows.note
    steps, *_ = _step_count(settings, rows.train, effective).split("\n")
    tokens = f", {rows.tokens * effective:,.0f} tokens a step" if rows.tokens is not None else ""
    return f"{rows.train} rows, steps: {steps}{tokens}"


def measure_model(section: ModelSection) -> Sizes:
    """Count a model's weights without loading or making any. Raises `UserError` when its configuration is not there."""
    config = model_config(section)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        adapter = adapter_config(section)
        if adapter is not None:
            model = get_peft_model(model, adapter)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    text = config.get_text_config()
    return Sizes(
        parameters, trainable, _width(section, config), text.num_hidden_layers, text.hidden_size, text.vocab_size
    )


def memory_parts(sizes: Sizes, settings: Mapping[str, Any], tokens: float, *, reference: float) -> dict[str, float]:
    """Bytes by part on one device, nothing sharded. `tokens`: what one forward reads; `settings`: a resolved recipe;
    `reference`: bytes that lie beside the policy for it."""
    # Adapters and their gradients are float32 whatever the weights are held in.
    width = sizes.width if sizes.trainable == sizes.parameters else BYTES["float32"]
    added = sizes.trainable * width if sizes.trainable != sizes.parameters else 0
    parts = {
        "weights": sizes.parameters * sizes.width + added,
        "gradients": sizes.trainable * width,
        "optimizer": sizes.trainable * _optimizer_bytes(str(settings["optim"]), width),
        "activations": _activations(sizes, settings, tokens),
        "reference": reference,
    }
    return {**parts, "in all": sum(parts.values())}


def _width(section: ModelSection, config: PreTrainedConfig) -> float:
    if section.load_in_4bit:
        return 0.5
    if section.load_in_8bit:
        return 1.0
    dtype = str(config.dtype or "float32").removeprefix("torch.") if section.dtype == "auto" else section.dtype
    return BYTES[dtype]


def _optimizer_bytes(optimizer: str, width: float) -> float:
    states = next((count for name, count in STATES.items() if name in optimizer), 2.0)
    return states * (1.0 if optimizer.endswith("8bit") else width)


def _activations(sizes: Sizes, settings: Mapping[str, Any], tokens: float) -> float:
    """With checkpointing one input per layer is kept, and one layer at a time is worked out again."""
    bf16 = is_torch_bf16_gpu_available() if settings["bf16"] is None else settings["bf16"]
    bytes_each = 2 if bf16 or settings["fp16"] or sizes.width < BYTES["float32"] else 4
    layer = LAYER_BYTES * bytes_each / 2 * tokens * sizes.hidden
    if settings["activation_checkpointing"]:
        return layer + sizes.layers * tokens * sizes.hidden * bytes_each
    return layer * sizes.layers


def _steps(settings: dict[str, Any], rows: Rows, devices: int) -> str:
    batch, accumulated = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    effective = batch * accumulated * devices
    table = {} if rows.train is None else {"rows": _row_count(rows)}
    table["effective batch"] = f"{effective} = {batch} a device x {accumulated} accumulated x devices: {devices}"
    table["steps"] = _step_count(settings, rows.train, effective)
    if rows.tokens is not None:
        each = f"{rows.tokens:.0f} a row, the prompt counted with every answer"
        table["tokens a step"] = f"{rows.tokens * effective:,.0f} ({each})"
    return f"{_table(table)}\n{rows.note}"


def _rows(rows: Rows) -> str:
    """Rows of a run of several stages, whose steps are told stage by stage."""
    return rows.note if rows.train is None else f"{_row_count(rows)}. {rows.note}"


def _row_count(rows: Rows) -> str:
    return f"{rows.train}" + ("" if rows.test is None else f" to train on, {rows.test} to evaluate on")


def _step_count(settings: dict[str, Any], rows: int | None, effective: int) -> str:
    if settings["max_steps"] > 0:
        return f"{settings['max_steps']} (max_steps)"
    epochs = settings["num_train_epochs"]
    if rows is None:
        return f"unknown (epochs: {epochs:g})"
    whole = settings.get("dataloader_drop_last", False)
    per_epoch = max(1, rows // effective if whole else math.ceil(rows / effective))
    steps = math.ceil(epochs * per_epoch)
    warms_up = settings.get("warmup_steps") and settings.get("lr_scheduler_type") != "constant"
    idle = f"\n{IDLE}" if steps == 1 and warms_up else ""
    return f"{per_epoch} an epoch, {steps} in all (epochs: {epochs:g}){idle}"


def _sizes(recipe: Recipe) -> Sizes | str:
    """The numbers of the recipe's model, or why they are not known."""
    try:
        return measure_model(recipe.model)
    except UserError as error:
        return str(error)


def _memory(recipe: Recipe, settings: dict[str, Any], rows: Rows, sizes: Sizes | str) -> str:
    if isinstance(sizes, str):
        return f"not estimated: {sizes}"
    batch = settings["per_device_train_batch_size"]
    longest = settings["max_length"] or rows.tokens or 0
    answers = 2 if recipe.objective().paired_required else 1
    tokens = batch * (rows.tokens if rows.tokens is not None else answers * longest)
    parts = memory_parts(sizes, settings, tokens, reference=reference_bytes(recipe, rows.kept, sizes))
    count = f"{sizes.parameters:,} weights, {sizes.trainable:,} of them trained"
    lines = {name: _bytes(value) for name, value in parts.items()}
    basis = "rows of mean length" if rows.tokens is not None else f"rows of {longest} tokens"
    return f"{count}\n{_table(lines)}\nActivations are a rough figure, for {batch} {basis}."


def _bytes(value: float) -> str:
    unit = 2**30 if value >= 2**30 else 2**20
    return f"{value / unit:,.1f} {'GiB' if unit == 2**30 else 'MiB'}"


def _table(lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
