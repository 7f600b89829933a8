"""Which values the settings of a run may have, and the reason for each refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from prefopt.errors import nearest
from prefopt.ranges import AMOUNT, COUNT, DECAY, POSITIVE, SEED, SHARE, Range

RANGES: dict[str, Range] = {
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": POSITIVE,
    "data_seed": SEED,
    "dataloader_num_workers": Range(0, whole=True),
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "eval_accumulation_steps": COUNT,
    "eval_delay": AMOUNT,
    "eval_steps": POSITIVE,
    "gradient_accumulation_steps": COUNT,
    "label_smoothing_factor": AMOUNT,
    "learning_rate": AMOUNT,
    "local_rank": Range(-1, whole=True),
    "logging_steps": POSITIVE,
    "max_bad_rows": Range(0, whole=True),
    "max_dropped": Range(0, 1),
    "max_grad_norm": AMOUNT,
    "max_length": Range(2, whole=True),
    "max_tokens_per_device": COUNT,
    "max_steps": Range(1, whole=True, also=(-1,)),
    "min_prompt_tokens": COUNT,
    "neftune_noise_alpha": AMOUNT,
    "num_train_epochs": POSITIVE,
    "pad_to_multiple_of": COUNT,
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "warmup_steps": AMOUNT,
    "weight_decay": AMOUNT,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "cut_answers": ("keep", "drop", "same_length"),
    "identical_pairs": ("drop", "refuse"),
    "on_bad_row": ("error", "skip"),
    "prompt_boundary": ("generation_prompt", "common_prefix"),
    "row_layout": ("auto", "plain", "shared"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "truncation_mode": ("keep_start", "keep_end", "drop"),
}

REFERENCE_SOURCES = ("auto", "cached", "live", "none")
REFERENCE_FORMS = ("auto", "hidden", "expected")
# TR-DPO's (arXiv 2404.09656) for a reference that moves; it holds where `sync_steps` is given.
MIXUP_ALPHA = 0.6

_REFERENCE_FREE = re.compile(r"(eval_(.+_)?)?(logps/(chosen|rejected)|entropy)")
_WAITS_FOR_A_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules of the learning rate

FIXED: dict[str, tuple[object, str]] = {
    "average_tokens_across_devices": (True, "every step is divided by the counts of all ranks. Remove this line"),
    "label_smoothing_factor": (0, "it has no effect on a preference loss. Remove this line"),
    "remove_unused_columns": (False, "rows carry columns that no model reads. Remove this line"),
}


def field_problem(name: str, value: Any) -> str | None:
    """Why a training setting may not have this value, without the field's name; None when it may."""
    if value is None:
        return None
    if name in FIXED and value != FIXED[name][0]:
        fixed, reason = FIXED[name]
        return f"stays {str(fixed).lower()} here: {reason}."
    if name in RANGES:
        problem = RANGES[name].problem(value)
        return f"{problem}." if problem else None
    if name in CHOICES and value not in CHOICES[name]:
        return f"`{value}` is not one of {', '.join(CHOICES[name])}.{nearest(str(value), CHOICES[name])}"
    check = {"accelerator_config": _accelerator, "loss_weights": _weights, "reference": _reference}.get(name)
    return check(value) if check else None


def _accelerator(value: Any) -> str | None:
    """These two cut or share out a batch along its first dimension, which would tear its flat token lists apart."""
    settings = vars(value) if isinstance(value, AcceleratorConfig) else value
    if not isinstance(settings, Mapping):
        return None
    taken = [name for name in ("dispatch_batches", "split_batches") if settings.get(name)]
    return f"{taken[0]} would cut the flat token lists of a batch. Remove it." if taken else None


def _weights(value: Any) -> str | None:
    if not isinstance(value, (list, tuple)) or not value:
        return "must be a list of numbers, one for each loss."
    problems = (AMOUNT.problem(weight) for weight in value)
    found = next((problem for problem in problems if problem), None)
    if found:
        return f"every weight {found}."
    return None if any(value) else "at least one weight must be above 0."


def _reference(value: Any) -> str | None:
    known = ("source", "form", "model", "revision", "store", "max_gb", "batch_size", "sync_steps", "mixup_alpha")
    if not isinstance(value, Mapping):
        return f"must be a block with {', '.join(known)}, not {value!r}."
    for key in value:
        if key not in known:
            return f"`{key}` is not one of {', '.join(known)}.{nearest(str(key), known)}"
    source = value.get("source", "auto")
    if source not in REFERENCE_SOURCES:
        return f"source `{source}` is not one of {', '.join(REFERENCE_SOURCES)}."
    if (form := value.get("form", "auto")) not in REFERENCE_FORMS:
        return f"form `{form}` is not one of {', '.join(REFERENCE_FORMS)}."
    if source == "none" and value.get("model"):
        return "source none and a model contradict each other. Remove one of them."
    ranges = {"max_gb": POSITIVE, "batch_size": COUNT, "sync_steps": COUNT, "mixup_alpha": SHARE}
    for key, range in ranges.items():
        problem = range.problem(value[key]) if value.get(key) is not None else None
        if problem:
            return f"{key} {problem}."
    conflict = sync_conflict(value)
    return " ".join(conflict) if conflict else None


def sync_conflict(reference: Mapping[str, Any]) -> tuple[str, str] | None:
    """The setting of a `reference` block that does not go with `sync_steps`, and the reason; None when all do."""
    if reference.get("sync_steps") is None:
        if reference.get("mixup_alpha") is not None:
            return "mixup_alpha", "has no effect without sync_steps. Write sync_steps: 512, or remove it."
        return None
    if reference.get("source") == "cached":
        return "source", "cached keeps the scores of one reference, and with sync_steps it moves. Write source: live."
    if reference.get("source") == "none":
        return "source", "none and sync_steps contradict each other. Remove one of them."
    if reference.get("form"):
        return "form", "has no effect with sync_steps: nothing is kept of a reference that moves. Remove it."
    return None


def selection_conflict(reference: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Why the steps of a run whose reference moves cannot be judged as the training `settings` say; None when they can.

    What is measured from the reference is a distance from another model after every move.
    """
    if reference.get("sync_steps") is None:
        return None
    keeps_best = settings.get("load_best_model_at_end")
    judges = keeps_best or settings.get("lr_scheduler_type") in _WAITS_FOR_A_METRIC
    metric = settings.get("metric_for_best_model") or ("loss" if judges else None)  # transformers' default
    if metric is not None and not _REFERENCE_FREE.fullmatch(metric):
        return (
            f"makes figures of different steps distances from different references, so `{metric}` cannot choose among "
            "them. Write metric_for_best_model: logps/chosen (or logps/rejected, entropy, which read no reference), or "
            "do without load_best_model_at_end, early stopping and schedules that wait for a metric."
        )
    if keeps_best and settings.get("save_only_model"):
        return (
            "moves the reference, and with save_only_model the best checkpoint does not hold it as it was then. Remove "
            "save_only_model or load_best_model_at_end."
        )
    return None
