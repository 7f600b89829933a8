"""Tiny models, tokenizers and rows, made in process and the same every time."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and saw two red birds fly over old stone walls near quiet river banks at dawn".split()

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(
    vocab_size: int = 320, *, bos: bool = True, pad_is_eos: bool = False, adds_bos: bool = False, chat: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the words above. `adds_bos`: a post-processor prepends it, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE if bos else CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


def make_model(
    seed: int = 0, vocab_size: int = 320, dtype: torch.dtype = torch.float32, **config: Any
) -> LlamaForCausalLM:
    """A random Llama, 2 layers of width 32."""
    torch.manual_seed(seed)
    settings = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype)


def text_pairs(n: int, seed: int = 0, **extra: Any) -> list[dict[str, Any]]:
    """`n` rows of random words: prompt 2-6, completions 2-10 words, always different."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = []
    for _ in range(n):
        prompt, chosen, rejected = words(2, 6), " " + words(2, 10), " " + words(2, 10)
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected + (" ." if rejected == chosen else ""), **extra}
        )
    return rows
