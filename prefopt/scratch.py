"""A tokenizer and a causal language model made from nothing: what a recipe's `from_scratch` block asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from prefopt.errors import RecipeError, nearest

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "user", "assistant", "tool")

# Every turn is header, content, end marker; the end marker is EOS, so one scored token ends an answer in text and
# in chat. What the template cannot show (other roles, tool calls) it refuses, since leaving it out would be silent.
CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('this chat template has no place for tools') }}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% if message['tool_calls'] %}{{ raise_exception('this chat template has no place for tool calls') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocab_size` entries, special tokens included.

    Any text can be encoded and decodes to itself. Encoding a text puts BOS before it; EOS is left to the caller, who
    knows where an answer ends. With `chat` the tokenizer carries a template whose role headers are single tokens and
    whose turns end with EOS; the template writes BOS itself. Raises `RecipeError` when `vocab_size` cannot hold the
    256 bytes and the special tokens.
    """
    special = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES if chat)]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise RecipeError(f"vocab_size is {vocab_size}, but 256 bytes and {len(special)} special tokens need {smallest}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return _wrap(core, chat)


def build_model(model_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal language model with random weights, in float32, the same for the same `seed`.

    `model_config` holds `model_type` (a name transformers knows, such as `llama`) and any fields of that type's
    configuration; the vocabulary size and the special token ids are the tokenizer's unless given. The random state
    of the caller is left as it was. Raises `RecipeError` for an unknown type, an unknown field, or values that do not
    fit together.
    """
    fields = dict(model_config)
    config_class = _config_class(fields.pop("model_type", None))
    _check_fields(config_class, fields)
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = config_class(**{**defaults, **fields})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"from_scratch: transformers cannot build this model: {error}") from error
    _check_vocabulary(model, tokenizer)
    return model


def _wrap(core: Tokenizer, chat: bool) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config_class(model_type: str | None) -> type[PreTrainedConfig]:
    """The configuration class of a type that has a causal language model."""
    known = [name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING]
    if model_type is None:
        raise RecipeError("from_scratch: `model_type` is missing; write for instance `model_type: llama`")
    if model_type not in known:
        hint = nearest(str(model_type), known)
        raise RecipeError(f"from_scratch: transformers has no causal language model of type `{model_type}`.{hint}")
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return config_class


def _check_fields(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> None:
    # A configuration keeps any name it is given, so a misspelt field would be stored and never read.
    known = {*config_class().to_dict(), *config_class.attribute_map}
    for name in fields:
        if name not in known:
            raise RecipeError(f"from_scratch: `{config_class.model_type}` has no field `{name}`.{nearest(name, known)}")


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise RecipeError(
            f"from_scratch: vocab_size is {rows}, but the tokenizer has {len(tokenizer)} entries; "
            "leave vocab_size out of the model's fields, or make it at least that"
        )
