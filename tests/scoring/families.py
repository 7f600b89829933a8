"""One tiny random model of each family, a batch of scored tokens, and what the model itself says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.scoring.model import enable_scoring
from tests import helpers

VOCABULARY = 97
SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2_SIZES = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "mistral": SIZES,
    "gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 0.3},
    "gemma3_text": {**SIZES, "head_dim": 8, "final_logit_softcapping": 0.3},
    "phi3": SIZES,
    "gpt2": GPT2_SIZES,
    "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "olmo2": SIZES,
    "granite": {**SIZES, "logits_scaling": 8.0},
    "hyperclovax": {**SIZES, "logits_scaling": 8.0},
    "minicpm3": {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "falcon": {**SIZES, "new_decoder_architecture": True},
    "falcon_h1": {**SIZES, "lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCABULARY,
            "logit_scale": 0.5},
    "stablelm": SIZES,
    "recurrent_gemma": {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 0.3,
                        "attention_window_size": 64},
    "nanochat": {**SIZES, "final_logit_softcapping": 0.3},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_experts": 4, "head_dim": 8},
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # no zero biases, logits away from 0
    return model.eval()


def batch(vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Three right-padded rows of 6 to 10 tokens; scored tokens in all of them, in scrambled order."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([10, 6, 8])
    input_ids = torch.randint(3, vocabulary, (3, 10), generator=generator)
    attention_mask = (torch.arange(10) < lengths.unsqueeze(1)).long()
    source = torch.tensor([23, 4, 5, 8, 12, 13, 14, 26, 24])
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "source": source,
        "target": torch.randint(vocabulary, source.shape, generator=generator),
    }


def backbone_inputs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


def own_logp(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Log-probabilities from the model's ordinary logits."""
    logits = model(**backbone_inputs(rows)).logits.flatten(0, 1)[rows["source"]]
    return logits.log_softmax(-1).gather(1, rows["target"].unsqueeze(1)).squeeze(1)


def scored(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return model(**rows)["logp"]


def all_gradients(model: nn.Module, logp: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logp * torch.arange(1, len(logp) + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # some are 0 but for rounding, such as those of key biases
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


def llama(**config: Any) -> PreTrainedModel:
    model = helpers.make_model(vocab_size=VOCABULARY, **config).eval()
    enable_scoring(model)
    return model
