"""Scores through PEFT: adapters inside the layers count, those that would go unseen are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.scoring.model import causal_lm, enable_scoring, refuse_unsupported
from tests import helpers
from tests.scoring.families import (
    VOCABULARY,
    all_gradients,
    assert_gradients_close,
    batch,
    llama,
    own_logp,
    scored,
)


def lora(model: PreTrainedModel, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    adapted = get_peft_model(
        model, LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, **changes})
    )
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


def test_backbone_that_takes_few_arguments() -> None:
    """PEFT names `labels` and others in every call, as None; a backbone from outside the library may not know them."""
    adapted, rows = lora(llama()), batch()
    expected = scored(adapted, rows)
    backbone = causal_lm(adapted).base_model
    forward = backbone.forward

    def strict(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    backbone.forward = strict
    assert torch.equal(scored(adapted, rows), expected)


def test_lora_gradients_are_its_own() -> None:
    adapted, rows = lora(llama()), batch()
    expected = all_gradients(adapted, own_logp(adapted, rows))
    found = all_gradients(adapted, scored(adapted, rows))
    assert all("lora" in name for name in found)
    assert_gradients_close(found, expected)


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
    assert_gradients_close(all_gradients(adapted, scored(adapted, rows)), expected)
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
