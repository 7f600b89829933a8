"""Scores from the model's own forward, over model families, adapters, copies and wrappers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.errors import UserError
from prefopt.scoring.model import causal_lm, enable_scoring, head_transform, refuse_unsupported
from prefopt.scoring.selfcheck import SelfCheck, check_scores
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
    "minicpm3": {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 8, "dim_model_base": 8},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "falcon": {**SIZES, "new_decoder_architecture": True},
    "falcon_h1": {**SIZES, "lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCABULARY, "logit_scale": 0.5},
    "stablelm": SIZES,
    "recurrent_gemma": {**SIZES, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 0.3, "attention_window_size": 64},
    "nanochat": {**SIZES, "final_logit_softcapping": 0.3},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_experts": 4, "head_dim": 8},
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
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


def llama(**config: Any) -> PreTrainedModel:
    model = helpers.make_model(vocab_size=VOCABULARY, **config).eval()
    enable_scoring(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_family_scores_and_gradients_are_its_own(family: str) -> None:
    model, rows = build(family), batch()
    expected = own_logp(model, rows)
    expected_gradients = all_gradients(model, expected)
    enable_scoring(model)
    found = scored(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found_gradients = all_gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5)
    check_scores(model, rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_float64_is_exact(family: str) -> None:
    model, rows = build(family, torch.float64), batch()
    enable_scoring(model)
    found = scored(model, rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, own_logp(model, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("gemma2", {}, (1.0, 0.3)),
        ("gemma2", {"final_logit_softcapping": None}, (1.0, None)),
        ("granite", {}, (0.125, None)),
        ("hyperclovax", {}, (8.0, None)),
        ("minicpm3", {}, (0.25, None)),
        ("cohere", {}, (0.25, None)),
        ("mpt", {}, (1.0, None)),
    ],
)
def test_head_transform(family: str, changes: dict[str, Any], expected: tuple[float, float | None]) -> None:
    assert head_transform(AutoConfig.for_model(family, **{**FAMILIES[family], **changes})) == expected


@pytest.mark.parametrize("train", [False, True])
def test_gradient_checkpointing(train: bool) -> None:
    model, rows = llama(), batch()
    expected = all_gradients(model, scored(model, rows))
    model.gradient_checkpointing_enable()
    model.train(train)
    found = all_gradients(model, scored(model, rows))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)


def test_statistics_are_fresh_and_as_asked() -> None:
    model = llama()
    scores = model(**batch(), statistics=("entropy", "logp"))
    assert list(scores) == ["entropy", "logp"]
    assert all(value.shape == (9,) and not value._is_view() for value in scores.values())


def test_unscored_positions_do_not_matter() -> None:
    """NaN in the embedding of a token that stands only behind the scored positions, and in nothing they see."""
    model, rows = llama(), batch()
    rows["input_ids"][rows["attention_mask"] == 0] = VOCABULARY - 1
    rows["input_ids"][rows["input_ids"] == VOCABULARY - 1] = VOCABULARY - 2
    rows["input_ids"][0, 9] = VOCABULARY - 1  # behind every scored position of row 0
    expected = scored(model, rows)
    expected_gradients = all_gradients(model, expected)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = 1e4
    found = scored(model, rows)
    assert torch.equal(found, expected)
    found_gradients = all_gradients(model, found)
    assert all(torch.equal(found_gradients[name], value) for name, value in expected_gradients.items())


def test_no_scored_token_reaches_every_parameter_with_zero() -> None:
    model, rows = llama(), batch()
    rows["source"], rows["target"] = rows["source"][:0], rows["target"][:0]
    gradients = all_gradients(model, scored(model, rows))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_autocast_runs_the_head_in_float32() -> None:
    """Under bf16 autocast the scores are the float32 head's on the same hidden states."""
    model, rows = llama(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored(model, rows)
        hidden = model.base_model(**backbone_inputs(rows)).last_hidden_state
    logits = hidden.flatten(0, 1)[rows["source"]].float() @ model.lm_head.weight.t()
    expected = logits.log_softmax(-1).gather(1, rows["target"].unsqueeze(1)).squeeze(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_deepcopy_uses_its_own_weights() -> None:
    model, rows = llama(), batch()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    uniform = torch.full((9,), -torch.log(torch.tensor(float(VOCABULARY))))
    torch.testing.assert_close(scored(clone, rows), uniform)
    assert not clone(**backbone_inputs(rows)).logits.any()
    torch.testing.assert_close(scored(model, rows), own_logp(model, rows), rtol=1e-5, atol=1e-5)


def test_enabling_twice_changes_nothing() -> None:
    model = llama()
    before = model.forward
    enable_scoring(model)
    assert model.forward == before


def test_a_replaced_forward_is_refused() -> None:
    model = helpers.make_model()
    model.forward = lambda **inputs: None
    with pytest.raises(UserError, match="already replaced"):
        enable_scoring(model)


def test_class_swap_of_fsdp(one_process: None) -> None:
    """FSDP2 gives the instance a new class; here with the head as a unit of its own, whose weight is a DTensor."""
    model, rows = llama(), batch()
    expected = scored(model, rows)
    expected_gradients = all_gradients(model, expected)
    fully_shard(model.lm_head)
    fully_shard(model)
    assert type(model).__name__ != "LlamaForCausalLM"
    found = scored(model, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for name, gradient in all_gradients(model, found).items():
        torch.testing.assert_close(gradient.full_tensor(), expected_gradients[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own_logp(model, rows), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_accelerate_wraps_and_unwraps() -> None:
    model, rows = llama(), batch()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    enable_scoring(prepared)
    assert scored(prepared, rows).dtype == torch.float32
    check_scores(prepared, rows)
    check_scores(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), rows)


def test_positional_arguments_stay_with_the_ordinary_forward() -> None:
    model, rows = llama(), batch()
    assert torch.equal(model(rows["input_ids"]).logits, model(input_ids=rows["input_ids"]).logits)
    with pytest.raises(TypeError, match="keyword"):
        model(rows["input_ids"], source=rows["source"], target=rows["target"])
    with pytest.raises(TypeError, match="target"):
        model(input_ids=rows["input_ids"], source=rows["source"])


def test_generate_is_the_same_for_left_padded_prompts() -> None:
    """`generate` reads the forward's signature to decide whether positions follow the padding."""
    model = build("gpt2")
    prompts = torch.tensor([[0, 0, 0, 5, 6, 7], [3, 4, 5, 6, 7, 8]])
    settings = dict(attention_mask=(prompts > 0).long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = model.generate(prompts, **settings)
    enable_scoring(model)
    assert torch.equal(model.generate(prompts, **settings), expected)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


def test_saving_leaves_no_trace(tmp_path: Path) -> None:
    model = helpers.make_model(vocab_size=VOCABULARY)
    keys = set(model.state_dict())
    enable_scoring(model)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert "forward" not in vars(loaded)


def lora(model: PreTrainedModel, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **changes}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted.eval()


def test_lora_scores_and_disabled_equals_base() -> None:
    model, rows = llama(), batch()
    base = scored(model, rows)
    adapted = lora(model)
    found = scored(adapted, rows)
    torch.testing.assert_close(found, own_logp(adapted, rows), rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(scored(adapted, rows), base)
    refuse_unsupported(adapted)
    assert causal_lm(adapted) is model


def test_lora_gradients_are_its_own() -> None:
    adapted, rows = lora(llama()), batch()
    expected = all_gradients(adapted, own_logp(adapted, rows))
    found = all_gradients(adapted, scored(adapted, rows))
    assert found.keys() == expected.keys() and all("lora" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_enabling_after_peft_reaches_the_inner_model() -> None:
    adapted, rows = lora(helpers.make_model(vocab_size=VOCABULARY)), batch()
    enable_scoring(adapted)
    torch.testing.assert_close(scored(adapted, rows), own_logp(adapted, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5, 6]}])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_head_copies_are_used(changes: dict[str, Any], tied: bool) -> None:
    adapted, rows = lora(llama(tie_word_embeddings=tied), **changes), batch()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    refuse_unsupported(adapted)
    torch.testing.assert_close(scored(adapted, rows), own_logp(adapted, rows), rtol=1e-5, atol=1e-5)
    expected = all_gradients(adapted, own_logp(adapted, rows))
    found = all_gradients(adapted, scored(adapted, rows))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(scored(adapted, rows), own_logp(adapted, rows), rtol=1e-5, atol=1e-5)


def test_lora_on_the_head_is_refused() -> None:
    with pytest.raises(UserError, match="modules_to_save"):
        refuse_unsupported(lora(llama(), target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_prompt_learning_is_refused_by_name(config: Any) -> None:
    with pytest.raises(UserError, match=type(config).__name__):
        refuse_unsupported(get_peft_model(llama(), config))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UserError, match="DataParallel"):
        refuse_unsupported(nn.DataParallel(llama()))


def test_models_without_a_plain_head_are_refused() -> None:
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=50)
    vision = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8},
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        enable_scoring(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(UserError, match="multimodal"):
        enable_scoring(transformers.Gemma3ForConditionalGeneration(vision))
    with pytest.raises(UserError, match="backbone"):
        enable_scoring(helpers.make_model().model)
    with pytest.raises(UserError, match="not a transformers model"):
        enable_scoring(nn.Linear(2, 2))


def test_self_check_prints_difference_and_bound() -> None:
    result = check_scores(llama(), batch())
    assert isinstance(result, SelfCheck) and 0 <= result.max_difference <= result.bound < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "unknown"), [("granite", {"logits_scaling": 0}), ("cohere", {"logit_scale": 0}), ("hyperclovax", {})]
)
def test_self_check_catches_an_unknown_scale(
    monkeypatch: pytest.MonkeyPatch, family: str, unknown: dict[str, int], dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    enable_scoring(model)
    check_scores(model, batch())
    monkeypatch.setattr("prefopt.scoring.model._SCALE_POWER_IN", {(family, name): p for name, p in unknown.items()})
    with pytest.raises(UserError, match=f"{type(model).__name__}.*bound.*logit"):
        check_scores(model, batch())


def test_self_check_catches_an_unknown_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    enable_scoring(model)
    monkeypatch.setattr("prefopt.scoring.model._SOFTCAPS", ())
    with pytest.raises(UserError, match="final_logit_softcapping=0.3"):
        check_scores(model, batch())
    assert check_scores(model, batch(), tolerance=10.0).bound == 10.0


def test_self_check_refuses_nan_and_restores_modes() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    check_scores(model, batch())
    assert model.training and not model.model.layers[0].training
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError):
        check_scores(model, batch())


def test_self_check_needs_scored_tokens() -> None:
    rows = batch()
    rows["source"], rows["target"] = rows["source"][:0], rows["target"][:0]
    with pytest.raises(ValueError, match="no token"):
        check_scores(llama(), rows)
