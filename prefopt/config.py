"""`PreferenceConfig`: transformers' TrainingArguments with the settings of preference training, checked when built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from prefopt.errors import UserError, nearest


@dataclass(frozen=True)
class Range:
    """Where a number may lie, ends included unless said otherwise; `also` holds single values allowed besides."""

    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    above_low: bool = False
    below_high: bool = False
    also: tuple[float, ...] = ()

    def problem(self, value: object) -> str | None:
        """Why `value` is refused, as the end of a sentence that starts with the field's name; None when it is fine."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"must be a number, not {value!r}"
        if self.whole and not isinstance(value, Integral):
            return f"must be a whole number, not {value!r}"
        if not _is_finite(value):
            return f"must be a finite number, not {value!r}"
        if value in self.also or self._holds(float(value)):
            return None
        return f"must be {self}, not {value!r}"

    def _holds(self, value: float) -> bool:
        over = value > self.low if self.above_low else value >= self.low
        return over and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        text = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        if self.high < math.inf:
            text += f" and below {self.high:g}" if self.below_high else f" and at most {self.high:.0f}"
        return text + "".join(f", or {value:g}" for value in self.also)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


COUNT = Range(1, whole=True)
AMOUNT = Range(0)
POSITIVE = Range(0, above_low=True)
SHARE = Range(0, 1, above_low=True)
SEED = Range(0, 2**32 - 1, whole=True)
DECAY = Range(0, 1, below_high=True)

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

# Not the field's default, so that a setting under the older name `gradient_checkpointing` can be told from none.
ACTIVATION_CHECKPOINTING = True

REFERENCE_SOURCES = ("auto", "cached", "live", "none")
REFERENCE_FORMS = ("auto", "hidden", "expected")
# TR-DPO's (arXiv 2404.09656) for a reference that moves; it holds where `sync_steps` is given.
MIXUP_ALPHA = 0.6

FIXED: dict[str, tuple[object, str]] = {
    "average_tokens_across_devices": (True, "every step is divided by the counts of all ranks. Remove this line"),
    "label_smoothing_factor": (0, "it has no effect on a preference loss. Remove this line"),
    "remove_unused_columns": (False, "rows carry columns that no model reads. Remove this line"),
}

DEFAULTS_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "train_sampling_strategy", "row_layout", "max_length", "truncation_mode", "cut_answers", "min_prompt_tokens",
    "max_dropped", "on_bad_row", "disable_dropout", "activation_checkpointing", "bf16", "fp16", "seed", "self_check",
    "logging_steps", "eval_strategy", "save_strategy", "save_steps", "report_to",
)  # fmt: skip
"""The settings a resolved recipe and the README's table of defaults always show."""


def shown_defaults() -> dict[str, Any]:
    """The settings of `DEFAULTS_SHOWN` with what they are when nobody sets them; null means "chosen by the device"."""
    defaults = {field.name: field.default for field in fields(PreferenceConfig)}
    shown = {name: getattr(defaults[name], "value", defaults[name]) for name in DEFAULTS_SHOWN}
    return {**shown, "activation_checkpointing": ACTIVATION_CHECKPOINTING}


def has_accelerator() -> bool:
    """Whether this machine has a device that is not the CPU."""
    return torch.accelerator.is_available()


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


# The parent's repr hides tokens; a generated one would print them.
@dataclass(repr=False)
class PreferenceConfig(TrainingArguments):
    """Every setting of a training run except the model, the data and the loss.

    Names and defaults are TRL's where TRL has them. All of transformers' TrainingArguments are accepted, except
    what cannot be exact here; those are refused by name.

    Raises `UserError` naming the field when a value is out of range, not finite, or has no effect.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a share of all steps."}
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in the machine's memory until the backward pass."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, slower. On unless set to false."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Compute in bfloat16. Not set: true on a GPU that has it, unless fp16 is set."},
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Processes that make batches ahead of their step. Not set: 1 beside a GPU, else none."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the rows: group_by_length (rows of like length share a batch), random or sequential.",
            "choices": list(CHOICES["train_sampling_strategy"]),
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log. Off, since such a run is broken."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays false: rows carry columns that no model reads."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP search for unused parameters every step; needed by few models."}
    )

    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of a prompt and one answer together; null for no limit."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What gives way when a row is too long: keep_start cuts the end of the answer, keep_end the start "
            "of the prompt, drop leaves the row out.",
            "choices": list(CHOICES["truncation_mode"]),
        },
    )
    cut_answers: str = field(
        default="keep",
        metadata={
            "help": "Rows whose answer was cut: keep them, drop them, or score both answers up to the same length.",
            "choices": list(CHOICES["cut_answers"]),
        },
    )
    min_prompt_tokens: int = field(default=16, metadata={"help": "Fewest prompt tokens that keep_end leaves."})
    max_dropped: float = field(
        default=0.01, metadata={"help": "Largest share of rows the length limit may drop before the run is refused."}
    )
    prompt_boundary: str = field(
        default="generation_prompt",
        metadata={
            "help": "Where a chat template renders the prompt differently once an answer follows: generation_prompt "
            "keeps what the model sees when it generates, common_prefix what both renderings share.",
            "choices": list(CHOICES["prompt_boundary"]),
        },
    )
    identical_pairs: str = field(
        default="drop",
        metadata={
            "help": "Pairs whose answers are the same tokens: drop and count them, or refuse them.",
            "choices": list(CHOICES["identical_pairs"]),
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments for the chat template; a row's own go before them."}
    )
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments for from_pretrained when the trainer is given a model's name."},
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise; as many as pay on the cores of this machine when not set."},
    )
    token_cache: str = field(
        default="auto",
        metadata={
            "help": "Where token ids are kept from one run to the next: auto (the folder of the reference store), "
            "never, or a folder."
        },
    )
    allow_unequal_segments: bool = field(
        default=False,
        metadata={"help": "Let the two sides of a pair count different numbers of assistant turns."},
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "A malformed row: error stops, skip counts it.", "choices": list(CHOICES["on_bad_row"])},
    )
    max_bad_rows: int | None = field(
        default=None, metadata={"help": "With on_bad_row skip: stop after more than this many; null for no limit."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad rows to a multiple of this many tokens."}
    )
    max_tokens_per_device: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a micro-batch. Batch size and accumulation are then settled before training, with "
            "as many rows a step as the two together say."
        },
    )
    row_layout: str = field(
        default="auto",
        metadata={
            "help": "Where answers lie: plain (each behind a copy of its prompt), shared (all of a prompt behind "
            "one copy, computed once), or auto: shared where it is faster and the model can take it.",
            "choices": list(CHOICES["row_layout"]),
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch off the dropout of the model."})
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the losses when there are several; 1 each when not set."}
    )
    reference: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "The reference model: source (auto; cached: scored once, before training; live: beside the "
            "policy; none), form (what is kept of whole distributions: auto, hidden, expected), model (the starting "
            "model when not set), revision, store, max_gb, batch_size; sync_steps (the reference follows the policy "
            "after every so many steps; never when not set) and mixup_alpha (how far, 0.6 when not set, 1 for a copy)."
        },
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "Where a recipe's run goes on from: auto (its newest whole checkpoint, if there is one), never, or "
            "the path of a checkpoint or a run folder. In Python, trainer.train(resume_from_checkpoint=...) says it."
        },
    )
    allow_change: None | str | list[str] = field(  # noqa: RUF036  (HfArgumentParser reads the first but None)
        default=None,
        metadata={
            "help": "Settings that may differ from the checkpoint's in a resumed run: names such as learning_rate, "
            "loss.beta, data, world_size."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "A resumed run takes the state of its callbacks from the checkpoint, early stopping's too."},
    )
    self_check: bool = field(
        default=True,
        metadata={"help": "Before step 1 compare scores with the model's own logits."},
    )

    def __post_init__(self) -> None:
        self._check_fields()
        # Launched on several processes without an accelerator, each rank would otherwise believe it is alone.
        self.use_cpu = self.use_cpu or not has_accelerator()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 1
        if isinstance(self.allow_change, str):
            self.allow_change = [self.allow_change]
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = ACTIVATION_CHECKPOINTING
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(f"training settings: {error}") from error
        self._check_devices()

    def _check_fields(self) -> None:
        for name in (*RANGES, *CHOICES, *FIXED, "loss_weights", "reference"):
            problem = field_problem(name, getattr(self, name))
            if problem:
                raise UserError(f"{name}: {problem}")

        if self.max_tokens_per_device is not None and self.auto_find_batch_size:
            raise UserError("auto_find_batch_size: max_tokens_per_device settles the batch size. Remove one of them.")
        if (self.reference or {}).get("sync_steps") and self._is_sharded():
            raise UserError(
                "reference: sync_steps moves whole weights, and FSDP and DeepSpeed hold them in pieces. Launch it with "
                "DDP (an adapter spares memory), or remove sync_steps"
            )

    def _check_devices(self) -> None:
        if self.activation_offloading and self.use_cpu:
            raise UserError("activation_offloading: there is no device here whose memory it would spare. Remove it.")
        # Read only now: before, the field may still be a path to a JSON file.
        problem = field_problem("accelerator_config", self.accelerator_config)
        if problem:
            raise UserError(f"accelerator_config: {problem}")
        if self.n_gpu > 1:
            raise UserError(
                f"this process sees {self.n_gpu} GPUs, and DataParallel would cut the flat token lists of a batch. "
                "Start it with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )

    def _is_sharded(self) -> bool:
        launched = any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")))
        return launched or bool(self.fsdp) or self.deepspeed is not None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, into `training_args.bin` for one: everything but the Hub token."""
        return {**self.__dict__, "hub_token": None}
