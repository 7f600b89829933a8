"""Scores from the model's own forward, over model families, copies and wrappers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.errors import UserError
from prefopt.scoring.model import enable_scoring, head_transform, refuse_unsupported
from prefopt.scoring.selfcheck import check_scores
from tests import helpers
from tests.scoring.families import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    all_gradients,
    assert_gradients_close,
    backbone_inputs,
    batch,
    build,
    llama,
    own_logp,
    scored,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_scores_and_gradients_are_its_own(family: str) -> None:
    model, rows = build(family), batch()
    expected = own_logp(model, rows)
    expected_gradients = all_gradients(model, expected)
    enable_scoring(model)
    found = scored(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_close(all_gradients(model, found), expected_gradients)
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
    assert_gradients_close(all_gradients(model, scored(model, rows)), expected)


def test_statistics_are_fresh_and_as_asked() -> None:
    model = llama()
    scores = model(**batch(), statistics=("entropy", "logp"))
    assert list(scores) == ["entropy", "logp"]
    assert all(value.shape == (9,) and not value._is_view() for value in scores.values())


def test_unscored_positions_do_not_matter() -> None:
    """NaN and inf in hidden states that are not scored reach neither scores nor the gradient of the head."""
    model, rows = llama(), batch()
    expected = scored(model, rows)
    expected_gradient = torch.autograd.grad(expected.sum(), model.lm_head.weight)[0]
    unscored = torch.ones(30, dtype=torch.bool).index_fill(0, rows["source"], False).view(3, 10)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        poisoned = output.masked_fill(unscored.unsqueeze(2), torch.nan)
        return poisoned.index_fill(1, torch.tensor([9]), torch.inf)

    model.model.norm.register_forward_hook(poison)
    found = scored(model, rows)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), model.lm_head.weight)[0], expected_gradient)


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


def test_accelerate_wraps_and_unwraps(monkeypatch: pytest.MonkeyPatch) -> None:
    # The state is one for the whole process, and another test may have made it without mixed precision.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
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


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UserError, match="DataParallel"):
        refuse_unsupported(nn.DataParallel(llama()))


def test_quantized_head_is_refused() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantized"):
        refuse_unsupported(model)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_at_the_end_needs_no_mask(family: str) -> None:
    """Without one, attention takes its causal kernel; no scored token may notice."""
    rows, model = batch(), build(family)
    enable_scoring(model)
    masked = model(**rows)["logp"]
    rows.pop("attention_mask")
    torch.testing.assert_close(model(**rows)["logp"], masked, atol=2e-6, rtol=0)
