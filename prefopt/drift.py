"""What must be the same in both halves of a resumed run: facts by name, and how they differ.

Facts are sealed into every checkpoint. A resume with other ones would finish another run under the first one's name, so
it is refused with a list of what differs, unless `allow_change` names it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefopt.config import PreferenceConfig
from prefopt.errors import UserError, nearest
from prefopt.losses import Objective
from prefopt.recipe.sections import DataSection, ModelSection
from prefopt.reference.hashing import hash_json, plain
from prefopt.report.results import plain as strict
from prefopt.report.results import without_secrets

# Every other setting of a run may change what comes out of it, if only by rounding.
FREE = frozenset((
    # what is said, and where
    "output_dir", "run_name", "project", "report_to", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
    "skip_memory_metrics", "debug",
    # what is saved and pushed
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    # where a run goes on
    "resume", "allow_change", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    # evaluation; what chooses the best model is not free
    "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "label_names", "do_train", "do_eval", "do_predict",
    # memory, and the speed of loading
    "activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "length_column_name", "dataset_num_proc",
    "token_cache", "max_tokens_per_device",
    # how it is launched; `world_size` and `sharding` are facts of their own
    "use_cpu", "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "accelerator_config",
    "parallelism_config",
    # what only decides whether a run is refused
    "on_bad_row", "max_bad_rows", "max_dropped", "self_check", "allow_unequal_segments",
    # the model, the loss and the reference are facts of their own, and speak better for themselves
    "model_init_kwargs", "loss_weights", "reference",
))  # fmt: skip
OTHERS = (
    "world_size", "sharding", "model", "trainable", "base", "adapter", "data", "loss", "loss_weights", "reference",
    "layout", "procedure", "plugin",
)  # fmt: skip
"""Facts that are no setting of the trainer."""

_LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
# Where an adapter comes from, and how it is run.
_NOT_THE_ADAPTER = {
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type", "inference_mode",
    "runtime_config",
}  # fmt: skip
_SAMPLES = 64  # values of each frozen tensor: another model differs in nearly all of them
_HASH = re.compile("[0-9a-f]{64}")
_LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class Difference:
    """A fact that is not the same; None stands for one that is not there."""

    name: str
    then: Any
    now: Any

    def text(self, place: str) -> str:
        """`learning_rate: 1e-06 in the checkpoint, 2e-06 now`."""
        return f"{self.name}: {_shown(self.then)} in {place}, {_shown(self.now)} now"

    def is_named(self, names: Iterable[str]) -> bool:
        """Whether one of `names` is this fact, or the block it belongs to."""
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The facts that differ, in the order of their names; blocks are compared field by field.

    A setting that is not there is at its default: it may have come with a later version.
    """
    before, after, defaults = flat(then), flat(now), _defaults()
    return [
        Difference(name, old, new)
        for name in sorted(before.keys() | after.keys())
        if (old := before.get(name, defaults.get(name))) != (new := after.get(name, defaults.get(name)))
    ]


def digest(facts: Mapping[str, Any]) -> str:
    """A hash of facts that is the same when nothing differs."""
    defaults = _defaults()
    return hash_json({name: value for name, value in flat(facts).items() if value != defaults.get(name)})


def refuse_drift(found: Collection[Difference], allowed: Iterable[str] | None, folder: Any, place: str) -> None:
    """Raise `UserError` with every difference that `allowed` does not name; None for what cannot be allowed.

    `place` says where the other value stands.
    """
    names = list(allowed or ())
    refused = [difference for difference in found if not difference.is_named(names)]
    if not refused:
        return
    lines = "\n".join(f"  {difference.text(place)}" for difference in refused)
    allow = ", ".join([*names, *(difference.name for difference in refused)])
    go_on = "" if allowed is None else f", or go on all the same with allow_change: [{allow}]"
    raise UserError(f"{folder}: not the same run:\n{lines}\nSet these back, choose another output_dir{go_on}")


def check_names(allowed: Iterable[str] | None, facts: Mapping[str, Any]) -> None:
    """Raise `UserError` for a name in `allow_change` that is no setting and none of the facts."""
    known, own = set(_settings()), flat(facts)
    for name in allowed or ():
        block = name.partition(".")[0]
        inside = [fact for fact in own if fact.startswith(f"{block}.")]
        # A block that this run does not have, or has as a whole, cannot be looked into.
        unknown_inside = "." in name and bool(inside)
        if name in own or any(fact.startswith(f"{name}.") for fact in own):
            continue
        if block not in known or unknown_inside:
            hint = nearest(name, inside if unknown_inside else known)
            raise UserError(f"allow_change: there is no setting `{name}`.{hint}")


def training_facts(args: PreferenceConfig) -> dict[str, Any]:
    """The settings that decide what comes out of a run, as strict JSON without secrets."""
    names = [field.name for field in dataclasses.fields(args) if field.name not in FREE]
    return as_facts({name: getattr(args, name) for name in names})


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Class and trained parameters of a model that is not wrapped yet, its adapter, and a hash of what is frozen.

    The frozen weights are in no checkpoint, so a resume must find the same ones; `_SAMPLES` values of each are read.
    """
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    frozen = {name: part for name, part in model.named_parameters() if not part.requires_grad}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    count = sum(_numel(part) for part in trained.values())
    shapes = {name: [str(part.dtype), *getattr(part, "ds_shape", part.shape)] for name, part in trained.items()}
    facts: dict[str, Any] = {
        "model": type(inner).__name__,
        "trainable": f"{count:,} parameters, {hash_json(shapes)[:16]}",
    }
    if frozen:
        facts["base"] = _sampled(frozen)
    if isinstance(model, PeftModel):
        config = plain(model.peft_config[model.active_adapter].to_dict())
        facts["adapter"] = config.pop("peft_type")
        kept = {name: value for name, value in config.items() if name not in _NOT_THE_ADAPTER}
        facts |= {_LORA.get(name, name): value for name, value in kept.items()}
    return as_facts(facts)


def loss_facts(objective: Objective) -> dict[str, Any]:
    """The losses with their knobs, named as in a recipe, and their weights."""
    losses = [{"name": loss.name, **dataclasses.asdict(loss)} for loss in objective.losses]
    return {"loss": losses if len(losses) > 1 else losses[0], "loss_weights": list(objective.weights)}


def as_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as strict JSON, without secrets."""
    return dict(without_secrets(strict(plain(values))))


def flat(facts: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Nested blocks, and lists of blocks, with dotted names: `{"loss": {"beta": 0.1}}` -> `{"loss.beta": 0.1}`."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{inside}{name}.")
        else:
            found[f"{inside}{name}"] = value
    return found


@functools.cache
def _defaults() -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(PreferenceConfig)}
    return as_facts({name: value for name, value in fields.items() if value is not dataclasses.MISSING})


@functools.cache
def _settings() -> tuple[str, ...]:
    sections = (PreferenceConfig, ModelSection, DataSection)
    return (*OTHERS, *(field.name for section in sections for field in dataclasses.fields(section)))


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 holds it in pieces


def _sampled(parameters: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(parameters):
        part = parameters[name].detach()
        found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
        if not isinstance(part, DTensor) and part.numel():
            values = part.reshape(-1)[:: max(1, part.numel() // _SAMPLES)].cpu().contiguous()
            found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    text = f"{text[:12]}..." if _HASH.fullmatch(text) else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
