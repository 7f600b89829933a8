"""Keys, the parts in which two of them differ, and models with adapters that have been somewhere."""

from __future__ import annotations

import copy

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from prefopt.reference.identity import identify
from tests import helpers


def key(model, **options):
    return identify(model, **options).key


def changed_parts(first, second):
    """The parts of the key that are not the same; the key itself must say as much."""
    before, now = first.about["parts"], second.about["parts"]
    parts = {name for name in before if before[name] != now[name]}
    assert (first.key != second.key) == bool(parts)
    return parts


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})


def with_adapter(config=None, model=None):
    """A model whose adapter has been somewhere."""
    model = get_peft_model(model or helpers.make_model(), config or lora())
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def add_copy(model, name, **changes):
    """The adapter once more, under another name."""
    config = copy.deepcopy(model.peft_config["default"])
    for field, value in changes.items():
        setattr(config, field, value)
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, save_embedding_layers=False), adapter_name=name)


ADAPTERS = {
    "lora": lora(),
    "every layer": lora(target_modules="all-linear"),
    "whole modules": lora(modules_to_save=["lm_head"]),
    "dora": lora(use_dora=True),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "tokens": lora(trainable_token_indices=[3, 5]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "virtual tokens": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}
