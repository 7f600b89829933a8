"""Opening what a run trains: tokenizer, policy, adapters, and the dropout policy. The only place that loads weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from prefopt.config import PreferenceConfig
from prefopt.errors import UserError
from prefopt.recipe.checks import scratch_config
from prefopt.recipe.sections import ModelSection
from prefopt.scoring.model import causal_lm, enable_scoring, refuse_unsupported

CHECK_NAME = "Check the name and the folder you are in; without a network, name a local folder."
# Settings of a recipe's adapter that must be those of an adapter it goes on with, and PEFT's names of them.
_ADAPTER_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(
    source: str | PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer at a local folder or a Hub name, or of a loaded model. Raises `UserError` when there is none."""
    name = source if isinstance(source, str) else source.config._name_or_path
    if not name:
        raise UserError("the model was not loaded from a folder or the Hub: pass its tokenizer as `processing_class`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from `{name}`: {_first_line(error)} {CHECK_NAME}") from error
    return complete_tokenizer(tokenizer)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token its end token: padding is masked by position, so the id never matters."""
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-sequence token: set `eos_token`, or answers can never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(model: str | PreTrainedModel, args: PreferenceConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model given to the trainer, at the revision the model is loaded from."""
    options = args.model_init_kwargs or {}
    kept = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    return load_tokenizer(model, **kept)


def open_model(model: str | nn.Module, args: PreferenceConfig, quantization_config: Any = None, **options: Any) -> Any:
    """A model given to the trainer: as it is, or loaded by its name with `args.model_init_kwargs` and `options`."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise UserError("`quantization_config` has no effect on a model that is already loaded: give its name")
        return model
    # TRL's name for what `from_pretrained` takes besides.
    return load_model(model, quantization_config=quantization_config, **{**(args.model_init_kwargs or {}), **options})


def open_reference(
    need: str, ref_model: str | nn.Module | None, args: PreferenceConfig, quantization_config: Any = None
) -> Any:
    """The reference given to the trainer as `ref_model`, or else in `args.reference`; None for the starting policy.

    A name is another repository than the policy's, so the policy's revision says nothing about it. Raises `UserError`
    when the settings say that there is none and the loss has the `need` of one.
    """
    settings = args.reference or {}
    if settings.get("source") == "none" and need != "none":
        raise UserError("reference: the source is `none`, but this loss needs a reference. Write `auto`")
    name, revision = (settings.get("model"), settings.get("revision")) if ref_model is None else (ref_model, None)
    return open_model(name, args, quantization_config, revision=revision) if isinstance(name, str) else name


def load_model(name: str, *, dtype: str = "float32", **options: Any) -> Any:
    """The causal language model at a local folder or a Hub name, in float32 unless told otherwise, as TRL does.

    `options` go to `from_pretrained` (`revision`, `attn_implementation`, `quantization_config`, ...). A folder that
    holds an adapter is opened as its base model with the adapter trainable.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: `{dtype}` is not one of {', '.join(DTYPES)}")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        # transformers opens an adapter folder too, but without PEFT's wrapper, which the reference pass needs.
        if find_adapter_config_file(name, revision=options.get("revision")) is not None:
            return _load_adapter(name, dtype, options)
        return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model `{name}` could not be loaded: {_first_line(error)} {CHECK_NAME}") from error


def load_reward_model(name: str, *, dtype: str = "auto") -> Any:
    """The reward model at a local folder or a Hub name: a sequence classifier with one output. Raises `UserError`."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the reward model `{name}` could not be loaded: {_first_line(error)} {CHECK_NAME}") from error
    if model.config.num_labels != 1:
        raise UserError(f"the reward model `{name}` has {model.config.num_labels} outputs; a reward model has one")
    return model


def _load_adapter(name: str, dtype: str, options: dict[str, Any]) -> PeftModel:
    config = PeftConfig.from_pretrained(name, revision=options.get("revision"))
    base = AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, dtype=DTYPES[dtype], **{**options, "revision": config.revision}
    )
    return PeftModel.from_pretrained(base, name, is_trainable=True, revision=options.get("revision"))


def model_config(section: ModelSection) -> PreTrainedConfig:
    """The configuration of the model a recipe starts from. Raises `UserError` where there is none to read."""
    if section.from_scratch is not None:
        return scratch_config(section.from_scratch)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(section.model_name_or_path),
            revision=section.model_revision,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(f"the configuration of `{section.model_name_or_path}` cannot be read. {reason}") from error
    return config


def holds_adapter(section: ModelSection) -> bool:
    """Whether the model a recipe starts from is an adapter, which is opened over the base it names."""
    name = section.model_name_or_path
    return name is not None and find_adapter_config_file(name, revision=section.model_revision) is not None


def new_adapter(section: ModelSection, model: nn.Module) -> LoraConfig | None:
    """The adapter to put on a loaded model, or None; one that the model came with goes on being trained.

    Raises `UserError` when that one is not the adapter the recipe describes.
    """
    config = adapter_config(section)
    if config is None or not isinstance(model, PeftModel):
        return config
    own: Any = model.peft_config[model.active_adapter]
    for setting, name in _ADAPTER_SETTINGS.items():
        if getattr(own, name, None) != getattr(config, name):
            raise UserError(
                f"{setting}: {getattr(config, name)}, but the adapter in `{section.model_name_or_path}`, which goes on "
                f"being trained, has {getattr(own, name, None)}. Write that, or merge the adapter into its base first"
            )
    return None


def adapter_config(section: ModelSection) -> LoraConfig | None:
    """The LoRA adapter a recipe asks for, or None."""
    if not section.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=section.model_revision,  # of the base, where the adapter is opened again
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.lora_target_modules,
        modules_to_save=section.lora_modules_to_save,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
    )


def quantization_config(section: ModelSection) -> BitsAndBytesConfig | None:
    """How a recipe wants frozen weights held (4 or 8 bits), or None."""
    if section.load_in_4bit:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return BitsAndBytesConfig(load_in_8bit=True) if section.load_in_8bit else None


def prepare_policy(
    model: Any, *, peft_config: PeftConfig | None, disable_dropout: bool, pad_token_id: int | None
) -> Any:
    """Make a loaded model the policy: scoring forward, dropout policy, adapters, in the order they need.

    Raises `UserError` when the model cannot be scored or nothing in it would be trained.
    """
    if peft_config is not None and isinstance(model, PeftModel):
        raise UserError(
            "`peft_config` was given for a model that already has an adapter: merge it first, or leave it out"
        )
    refuse_unsupported(model)
    if getattr(model.config, "output_router_logits", False):
        raise UserError(
            "the model asks for its router loss (`output_router_logits`), which is not added here: set it to false"
        )
    enable_scoring(model)
    if disable_dropout:
        silence_dropout(model)
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
        refuse_unsupported(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no trainable parameter: unfreeze it, or pass `peft_config`")
    model.config.pad_token_id = pad_token_id
    return model


def silence_dropout(model: nn.Module) -> int:
    """Set every dropout probability of `model` to 0 and return how many were not; adapters keep what their user set.

    Attention dropout is a number on the module, not an `nn.Dropout`, and Falcon or GPT-J read theirs from the
    configuration at each forward, so all three are looked for.
    """
    silenced = _zero_dropout_numbers(model.config)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            silenced += module.p > 0
            module.p = 0.0
        silenced += _zero_dropout_numbers(module)
    return silenced


def has_dropout(model: nn.Module) -> bool:
    """Whether anything in a model, its adapters included, drops out at random in training."""
    modules = list(model.modules())
    return any(isinstance(each, nn.Dropout) and each.p > 0 for each in modules) or any(
        _dropout_numbers(owner) for owner in (causal_lm(model).config, *modules)
    )


def _zero_dropout_numbers(owner: Any) -> int:
    names = _dropout_numbers(owner)
    for name in names:
        setattr(owner, name, 0.0)
    return len(names)


def _dropout_numbers(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float) and value > 0]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
