"""What function a reference model is, as a content hash under which its scores are stored.

Whatever changes the function changes the key. What changes only rounding (attention kernel, layout, batch size), or
nothing at all (paths, names, versions, dropout, which is off when a reference is scored), leaves it alone. In doubt the
key changes: scoring once more costs time, and the scores of another function are wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.reference.hashing import hash_json, hash_tensors, plain
from prefopt.reference.implementation import implementation, model_class, qualified_name
from prefopt.scoring.model import causal_lm, head_transform

# Fields of a model's configuration that change nothing, or rounding alone, in what a forward in eval mode computes.
_NOT_THE_FUNCTION = {
    # where it comes from; class and code count by themselves
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map",
    # the dtype to load weights in; the one they have counts
    "dtype", "torch_dtype",
    # what is returned besides logits, and by which way it is computed
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
    "chunk_size_feed_forward", "pretraining_tp",
    # padding is masked by position, and the ends of a text are in its token ids
    "pad_token_id", "bos_token_id", "eos_token_id",
    # for classifiers
    "id2label", "label2id", "num_labels", "problem_type",
    # for initialisation and training
    "initializer_range", "router_aux_loss_coef",
}  # fmt: skip
# The same of an adapter's configuration.
_NOT_THE_ADAPTER = {
    # where it comes from
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type",
    # how its weights began, which no longer matters when they are there
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # how it is run
    "inference_mode", "runtime_config", "megatron_config", "megatron_core",
}  # fmt: skip
# Parts of a tensor's name that say how the model is wrapped: `torch.compile`, activation checkpointing.
_TRANSPARENT = {"_orig_mod", "_checkpoint_wrapped_module"}
# What PEFT calls the module it has put an adapter around.
_WRAPPED = {"base_layer", "original_module", "token_adapter"}


class Below(Enum):
    """The type of `ADAPTER_OFF`."""

    ADAPTER = "adapter off"


ADAPTER_OFF: Final = Below.ADAPTER
"""Asks `identify` for the base model below an adapter."""


@dataclass(frozen=True)
class Identity:
    """A function from token ids to log-probabilities.

    `key` is the SHA-256 (hex) of all that makes it: weights, adapter, configuration, precision and code. `weights` is
    that of the whole, unsharded weights alone. `about` is JSON for people; its `parts` are what the key is made from.
    """

    key: str
    weights: str
    about: dict[str, Any]


FLAT = "FSDP 1 hides the weights of a model in flat pieces: set `fsdp_version: 2`"


def identify(
    model: nn.Module, *, adapter: str | Below | None = None, compute_dtype: torch.dtype | None = None
) -> Identity:
    """Which function `model` is, however it is wrapped or sharded.

    `adapter`: None for the model as it stands, a name for the model with that adapter, or `ADAPTER_OFF` for its base,
    which has the key of the same model without PEFT. `compute_dtype` is that of autocast. Every rank calls it: weights
    are gathered one at a time, and all ranks get the answer of the main process, perhaps the only one that has loaded
    them. Raises `UserError` for a merged adapter, and for FSDP 1: neither leaves the base where it could be read.
    """
    _refuse_unreadable(model)
    outer, inner = _peft_model(model), causal_lm(model)
    base, adapters = _tensors(outer, inner)
    added, tensors = {}, dict(base)
    weights = hash_tensors(base)
    for name in _counted(outer, inner, adapter):
        own = _of_adapter(name, outer, adapters)
        added[name] = {"weights": hash_tensors(own), **_adapter_settings(name, outer, inner)}
        tensors.update(own)
    configuration = configuration_of(inner)
    parts = {
        "weights": weights,
        "adapter": hash_json(sorted(map(hash_json, added.values()))) if added else None,
        "configuration": hash_json(configuration),
        "precision": _precision(inner, tensors, compute_dtype),
        "code": implementation(inner),
    }
    whole = hash_json([weights, *sorted(part["weights"] for part in added.values())]) if added else weights
    about = {
        **_for_people(inner),
        "dtype": ", ".join(_dtypes(tensors.values())),
        "compute_dtype": compute_dtype and _name(compute_dtype),
        "parameters": _count(tensors),
        "adapter": added or None,
        "configuration": configuration,
        "parts": parts,
    }
    # Only the main process has hashes of tensors.
    return broadcast_object_list([Identity(hash_json(parts), whole, plain(about))])[0]


def configuration_of(inner: PreTrainedModel) -> dict[str, Any]:
    """The fields of a causal language model's configuration that make its function, and what follows its head."""
    return _fields(inner.config.to_dict(), _NOT_THE_FUNCTION) | {"logits": head_transform(inner.config)}


def _for_people(inner: PreTrainedModel) -> dict[str, Any]:
    """What is good to know of a model and is not in its key."""
    config: Any = inner.config
    return {
        "class": qualified_name(model_class(inner)),
        "name": config._name_or_path or None,
        "commit": getattr(config, "_commit_hash", None),
        "attention": config._attn_implementation,
        "device": inner.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _refuse_unreadable(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise UserError(FLAT)
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UserError("an adapter is merged into the weights of the model: call its `unmerge_adapter()` first")


def _peft_model(model: nn.Module) -> Any:
    """The PEFT model inside other wrappers, or else the causal language model."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), causal_lm(model))


def _tensors(outer: nn.Module, inner: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors of a model: those of the model below PEFT, by the names they have there, and those of any adapter."""
    prefix = next(f"{name}." if name else "" for name, module in outer.named_modules() if module is inner)
    wrapping = _adapted(inner)
    base, adapters = {}, {}
    for name, value in outer.state_dict(keep_vars=True).items():
        own = _base_name(_clean(name).removeprefix(prefix), wrapping) if _clean(name).startswith(prefix) else None
        if own is None:
            adapters[_clean(name)] = value
        else:
            base[own] = value
    return base, adapters


def _adapted(inner: nn.Module) -> set[str]:
    """The modules PEFT has put an adapter around."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {_clean(name) for name, module in inner.named_modules() if isinstance(module, kinds)}


def _base_name(name: str, adapted: set[str]) -> str | None:
    """What a tensor is called without PEFT; None when it belongs to an adapter."""
    parts, kept = name.split("."), []
    for position, part in enumerate(parts):
        if ".".join(parts[:position]) not in adapted:
            kept.append(part)
        elif part not in _WRAPPED:
            return None
    return ".".join(kept)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _counted(outer: Any, inner: nn.Module, adapter: str | Below | None) -> list[str]:
    """The adapters that take part."""
    if isinstance(adapter, str) and adapter not in getattr(outer, "peft_config", {}):
        raise ValueError(f"the model has no adapter called {adapter}")
    if adapter is not None:
        return [] if isinstance(adapter, Below) else [adapter]
    layers = [module for module in inner.modules() if isinstance(module, BaseTunerLayer)]
    if isinstance(outer, PeftModel) and not layers:  # virtual tokens
        return sorted(outer.active_adapters)
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _of_adapter(name: str, outer: Any, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one adapter, by names in which its own name is left out."""
    others = set(outer.peft_config) - {name}
    split = {full: full.split(".") for full in adapters}
    return {
        ".".join(part for part in parts if part != name): adapters[full]
        for full, parts in split.items()
        if not others.intersection(parts)
    }


def _adapter_settings(name: str, outer: Any, inner: nn.Module) -> dict[str, Any]:
    """What makes the function of an adapter besides its weights.

    The scale of each layer follows from the configuration until somebody sets it by hand.
    """
    layers = {_clean(path): layer for path, layer in inner.named_modules() if isinstance(layer, BaseTunerLayer)}
    scaling = {path: getattr(layer, "scaling", {}).get(name) for path, layer in layers.items()}
    return {
        "configuration": plain(_fields(outer.peft_config[name].to_dict(), _NOT_THE_ADAPTER)),
        "scaling": hash_json(scaling),
    }


def _fields(configuration: Mapping[str, Any], irrelevant: set[str]) -> dict[str, Any]:
    """The fields that count. One that is None is not set, and newer releases add such fields."""
    return {
        name: _fields(value, irrelevant) if isinstance(value, Mapping) and "model_type" in value else value
        for name, value in configuration.items()
        if name not in irrelevant and value is not None and not _is_dropout(name, value)
    }


def _is_dropout(name: str, value: Any) -> bool:
    return "drop" in name and (isinstance(value, float) or (value == 0 and value is not False))


def _precision(inner: nn.Module, tensors: Mapping[str, Any], compute_dtype: torch.dtype | None) -> dict[str, Any]:
    """The dtypes that are computed in.

    Buffers that are not saved are computed from the configuration, and differently rounded on another device, so only
    their dtype counts: rotary frequencies cast to bfloat16 are another function.
    """
    adapted = _adapted(inner)
    names = {_base_name(_clean(name), adapted): buffer for name, buffer in inner.named_buffers()}
    unsaved = [buffer for name, buffer in names.items() if name is not None and name not in tensors]
    return {
        "weights": _dtypes(tensors.values()),
        "unsaved_buffers": _dtypes(buffer for buffer in unsaved if buffer.is_floating_point()),
        "compute": compute_dtype and _name(compute_dtype),
    }


def _dtypes(tensors: Iterable[Any]) -> list[str]:
    return sorted({_name(tensor.dtype) for tensor in tensors})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(tensors: Mapping[str, Any]) -> int:
    parameters = {id(tensor): tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters.values())
