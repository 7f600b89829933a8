"""`PreferenceConfig`: transformers' TrainingArguments with the settings of preference training, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from prefopt.errors import UserError
from prefopt.settings import CHOICES, FIXED, RANGES, field_problem, selection_conflict

# Not the field's default, so that a setting under the older name `gradient_checkpointing` can be told from none.
ACTIVATION_CHECKPOINTING = True

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
        if conflict := selection_conflict(self.reference or {}, vars(self)):
            raise UserError(f"reference: sync_steps {conflict}")

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
