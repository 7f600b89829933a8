"""A tokenizer and a causal language model made from nothing: what a recipe's `from_scratch` block asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefopt.errors import RecipeError
from prefopt.recipe.checks import scratch_config

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = ("system", "developer", "user", "assistant", "tool")

# Every turn is header, content, end marker; the end marker is EOS, so one scored token ends an answer in text and
# in chat. What the template cannot show (other roles, tool calls) it refuses, since leaving it out would be silent.
CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('this chat template has no place for tools') }}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
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
        raise RecipeError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}")
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


def build_model(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model with random weights, in float32, the same for the same `seed`.

    `fields` holds `model_type` (a name transformers knows, such as `llama`) and any fields of that type's
    configuration; the vocabulary size and the special token ids are the tokenizer's unless given. The caller's random
    state is left as it was. Raises `RecipeError` for an unknown type, an unknown field, or values that do not fit
    together.
    """
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = scratch_config({**from_tokenizer, **fields})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    except RecipeError as error:
        raise RecipeError(f"from_scratch: {error}") from error
    # Some types check their numbers only while the layers are built.
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"from_scratch: transformers cannot build this model: {error}") from error
    _check_vocabulary(model, tokenizer)
    return model


def _wrap(core: Tokenizer, chat: bool) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.config.get_text_config().vocab_size
    if rows < len(tokenizer):
        raise RecipeError(
            f"from_scratch: vocab_size is {rows}, but the tokenizer has {len(tokenizer)} entries; "
            "leave vocab_size out of the model's fields, or make it at least that"
        )
