"""Names of older or other trainers that recipes still carry, and what to write instead."""

from __future__ import annotations

from collections.abc import Collection

from prefopt.losses.elsewhere import IN_TRL

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "lr": "learning_rate",
    "max_completion_length": "max_length",
    "max_prompt_length": "max_length",
    "max_seq_length": "max_length",
    "max_target_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "ref_model_mixup_alpha": "reference.mixup_alpha",
    "ref_model_name_or_path": "reference.model",
    "ref_model_sync_steps": "reference.sync_steps",
    "tokenizer": "tokenizer_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "torch_dtype": "dtype",
    "train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
}
"""Older name -> the name to write."""

NOTES = {
    "max_completion_length": "It counts prompt and answer together.",
    "max_prompt_length": "It counts prompt and answer together.",
    "max_target_length": "It counts prompt and answer together.",
    "ref_model_mixup_alpha": "It is read beside reference.sync_steps.",
    "ref_model_sync_steps": "It stands for sync_ref_model: true as well.",
    "warmup_ratio": "A value below 1 is a share of all steps.",
}
"""What to know besides the new name."""

RETIRED = {
    "cpo_alpha": "write a list of two losses, simpo (or another) and sft, and loss_weights with this number for sft.",
    "dataset_mixer": "write datasets: a list of {path, split, fraction}.",
    "dataset_mixture": "write datasets: a list of {path, split, fraction}.",
    "dataset_splits": "write dataset_train_split and dataset_test_split.",
    "discopop_tau": "DiscoPOP is not part of prefopt. Remove this line.",
    "f_alpha_divergence_coef": "write loss: {name: fdpo, divergence: alpha, alpha: ...}, with alpha = 1 - this number.",
    "f_divergence_type": "write loss: {name: fdpo, divergence: ...} with forward_kl, js or alpha; reverse_kl is dpo.",
    "force_use_ref_model": "write reference: {source: live}.",
    "generate_during_eval": "is not supported. Remove this line.",
    "group_by_length": "write train_sampling_strategy: group_by_length, or random.",
    "hub_token": "a token does not belong in a recipe. Set HF_TOKEN or run `hf auth login`.",
    "is_encoder_decoder": "only decoders are supported. Remove this line.",
    "label_pad_token_id": "padding is never scored. Remove this line.",
    "ld_alpha": "length-desensitised DPO is not part of prefopt. Remove this line.",
    "local_rank": "the launcher sets it. Remove this line.",
    "model_adapter_name": "the reference of an adapter is the model without it. Remove this line.",
    "model_init_kwargs": "write dtype, attn_implementation and model_revision as lines of their own.",
    "overwrite_output_dir": "a run never overwrites another. Remove this line, or name a new output_dir.",
    "pad_token": "the tokenizer's own is taken, and padding is never scored. Remove this line.",
    "padding_free": "is not supported; train_sampling_strategy: group_by_length saves padding. Remove this line.",
    "padding_value": "padding is never scored. Remove this line.",
    "parallelism_config": "write it into the config file of `accelerate launch`. Remove this line.",
    "plugin": "a recipe runs no code. Write `--plugin FILE` on the command line.",
    "plugins": "a recipe runs no code. Write `--plugin FILE` on the command line.",
    "precompute_ref_batch_size": "write reference: {batch_size: ...}.",
    "precompute_ref_log_probs": "write reference: {source: cached}, or source: live for false.",
    "preprocessing_num_workers": "rows are tokenised in one process in this version. Remove this line.",
    "ref_adapter_name": "write reference: {model: ...} with the path of the adapter.",
    "ref_model_init_kwargs": "write reference: {model: ..., revision: ...}.",
    "reference_free": "is not supported. Choose a loss that needs no reference (`prefopt losses`).",
    "resume_from_checkpoint": "write resume: auto, never, or the path of a checkpoint; auto is the default.",
    "router_aux_loss_coef": "is not supported: the router's loss is not added. Remove this line.",
    "rpo_alpha": "write a list of two losses, dpo and sft, and loss_weights.",
    "simpo_gamma": "write loss: {name: simpo, gamma: ...}; it stands for the same.",
    "sync_ref_model": "write reference: {sync_steps: 512, mixup_alpha: 0.6}, or leave it out for false.",
    "use_logits_to_keep": "only scored positions meet the vocabulary in any case. Remove this line.",
    "use_weighting": "WPO's weights are not supported. Remove this line.",
}
"""Names that have no single successor -> what to write instead."""


def remedy(name: str, value: str | None) -> str | None:
    """What to write instead of a name from elsewhere, with its value where that stays; None for other names."""
    if name in RENAMED:
        shown = f": {value}" if value else ""
        note = f" {NOTES[name]}" if name in NOTES else ""
        return f"write {RENAMED[name]}{shown}.{note}"
    return RETIRED.get(name)


def loss_type_remedy(written: str, known: Collection[str]) -> str:
    """What to write for TRL's `loss_type`; `known` are the losses there are."""
    name = IN_TRL.get(written, written)
    if name in known:
        return f"write loss: {{name: {name}}}."
    return f"write loss: {{name: ...}} with one of {', '.join(known)}."
