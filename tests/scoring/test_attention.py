"""Answers that share their prompt score as they do alone, family by family; what cannot do it says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefopt.data.collation import Collator
from prefopt.errors import UserError
from prefopt.reference.live import plan_of
from prefopt.scoring.attention import tree_masks
from prefopt.scoring.model import enable_scoring
from prefopt.scoring.selfcheck import check_layouts
from tests.scoring.families import FAMILIES, all_gradients, assert_gradients_close, build

LFM2 = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=97, layer_types=["conv", "full_attention"], pad_token_id=0)  # fmt: skip
JAMBA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=97, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
             use_mamba_kernels=False, pad_token_id=0)  # fmt: skip
MAMBA = dict(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=8, pad_token_id=0)
GPT_NEO = dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6,
               vocab_size=97, max_position_embeddings=64)  # fmt: skip
STATEFUL = {"lfm2": LFM2, "jamba": JAMBA, "mamba": MAMBA, "falcon_h1": {}, "recurrent_gemma": {}}
BY_PLACE = {"mpt": {}, "gpt_neo": GPT_NEO}
WINDOW = {"sliding_window": 6}
WINDOWED = {
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "phi3": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}
WHOLE = [name for name in FAMILIES if name not in {*STATEFUL, *BY_PLACE}]


def some_rows() -> list[dict[str, Any]]:
    """Pairs longer than the windows above, two of them of one prompt; prompts longer than answers and shorter."""
    rng = np.random.default_rng(0)
    rows = []
    for number, lengths in enumerate([(9, 5, 9), (14, 6, 4), (3, 2, 3), (9, 4, 3)]):
        prompt, chosen, rejected = (rng.integers(3, 97, length).astype(np.int32) for length in lengths)
        row = {"row": number, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "columns": {}}
        rows.append({**row, "chosen_scored": chosen > 0, "rejected_scored": rejected > 0})
    rows[3]["prompt_ids"] = rows[0]["prompt_ids"]
    return rows


PLAIN, SHARED = (Collator(shared=shared)(some_rows()) for shared in (False, True))


def model_of(family: str, changes: dict[str, Any]) -> nn.Module:
    model = build(family, **changes)
    enable_scoring(model)
    return model


@pytest.mark.parametrize(("family", "changes"), [(name, {}) for name in WHOLE] + list(WINDOWED.items()))
def test_scores_and_gradients_of_the_layouts_agree(family, changes):
    model = model_of(family, changes)
    plain, shared = (model(**plan_of(batch))["logp"] for batch in (PLAIN, SHARED))
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert_gradients_close(all_gradients(model, shared), all_gradients(model, plain))
    found = check_layouts(model, plan_of(PLAIN), plan_of(SHARED), PLAIN["sequence"], "no")
    assert found.max_difference <= found.bound < 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_checkpointing_and_autocast_keep_the_layouts_together(implementation):
    model = model_of("llama", {"attn_implementation": implementation}).train()
    expected = all_gradients(model, model(**plan_of(PLAIN))["logp"])
    model.gradient_checkpointing_enable()
    assert_gradients_close(all_gradients(model, model(**plan_of(SHARED))["logp"]), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, shared = (model(**plan_of(batch))["logp"] for batch in (PLAIN, SHARED))
    torch.testing.assert_close(shared, plain, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", BY_PLACE)
def test_attention_by_place_in_the_row_is_found_out(family):
    """Alibi, and a window inside the model, count places and not positions: scored without a word, and wrongly."""
    model = model_of(family, BY_PLACE[family])
    found = check_layouts(model, plan_of(PLAIN), plan_of(SHARED), PLAIN["sequence"], "no")
    assert found.max_difference > 10 * found.bound


@pytest.mark.parametrize("family", STATEFUL)
def test_layers_with_a_state_that_runs_past_an_answer_are_refused(family):
    model = model_of(family, STATEFUL[family])
    with pytest.raises(UserError, match="carry a state from token to token"):
        model(**plan_of(SHARED))


def test_a_wrong_score_is_found_out_in_half_precision_too():
    model = model_of("llama", {}).to(torch.bfloat16)
    seen_by_all = {**plan_of(SHARED), "branch": SHARED["branch"].clamp(max=1)}  # an answer sees those before it
    right = check_layouts(model, plan_of(PLAIN), plan_of(SHARED), PLAIN["sequence"], "no")
    wrong = check_layouts(model, plan_of(PLAIN), seen_by_all, PLAIN["sequence"], "no")
    assert right.max_difference <= right.bound < wrong.max_difference


def config(attention: str = "sdpa", **settings: Any) -> PreTrainedConfig:
    made = PreTrainedConfig(**settings)
    made._attn_implementation_internal = attention
    return made


# A prompt of three tokens, answers of two and three, and padding.
BRANCH = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 0]])


def seen(mask: Tensor) -> list[str]:
    return ["".join("x" if sees else "." for sees in row) for row in mask[0, 0, :8, :8].tolist()]


def test_an_answer_sees_the_prompt_and_itself():
    mask = tree_masks(config(), BRANCH, POSITIONS, torch.float32)
    assert seen(mask) == [
        "x.......", "xx......", "xxx.....",
        "xxxx....", "xxxxx...",
        "xxx..x..", "xxx..xx.", "xxx..xxx",
    ]  # fmt: skip
    assert mask[0, 0].any(-1).all()  # a query that sees nothing is not a number in some kernels
    assert not mask[0, 0, :8, 8].any()


def test_windows_and_chunks_count_positions():
    masks = tree_masks(
        config(layer_types=["sliding_attention", "chunked_attention"], sliding_window=2, attention_chunk_size=4),
        BRANCH,
        POSITIONS,
        torch.float32,
    )
    assert seen(masks["sliding_attention"])[3:] == ["..xx....", "...xx...", "..x..x..", ".....xx.", "......xx"]
    assert seen(masks["chunked_attention"])[3:] == ["xxxx....", "....x...", "xxx..x..", "......x.", "......xx"]


def test_masks_have_the_form_that_attention_takes():
    assert tree_masks(config(sliding_window=4), BRANCH, POSITIONS, torch.bfloat16).dtype == torch.bool
    eager = tree_masks(config("eager"), BRANCH, POSITIONS, torch.bfloat16)
    assert eager.dtype == torch.bfloat16 and eager.unique().tolist() == [torch.finfo(torch.bfloat16).min, 0.0]


def test_kernels_and_layers_that_take_no_mask_are_refused():
    with pytest.raises(UserError, match="flash_attention_2 takes no mask"):
        tree_masks(config("flash_attention_2"), BRANCH, POSITIONS, torch.float32)
    with pytest.raises(UserError, match="conv carry a state"):
        tree_masks(config(layer_types=["conv"]), BRANCH, POSITIONS, torch.float32)
