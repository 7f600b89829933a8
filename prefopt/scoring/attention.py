"""Who sees whom in a row where several answers share one prompt.

The masks are made here, on the device, from two small numbers a token: the branch it is on and its position. They come
in the form that the model's attention takes: boolean for SDPA, additive for eager attention, a block mask for
FlexAttention on CUDA (that last one has not been run yet). Distances count in positions, not in places in the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_causal_mask_function,
)

from prefopt.errors import UserError

MaskFunction = Callable[..., Any]

# What takes a mask. The others (flash attention) know only causal rows.
TAKES_MASKS = ("sdpa", "eager", "flex_attention")


def tree_masks(config: PreTrainedConfig, branch: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Any:
    """The attention mask of rows in which answers share a prompt, as a backbone with this configuration takes it.

    `branch` `[R,T]` is 0 on the prompt, 1 and on for the answers, -1 on padding; `position_ids` `[R,T]` restart at the
    prompt's end for each answer. A model whose layers differ gets a mask for each kind of layer, by its name. Additive
    masks are of `dtype`. Raises `UserError` where attention takes no mask or a layer is not attention alone.
    """
    implementation = config._attn_implementation
    if implementation not in TAKES_MASKS:
        raise UserError(f"the attention kernel {implementation} takes no mask of its own")

    def mask(kind: str) -> Any:
        rows, width = branch.shape
        reach = remap_positions_for_packed_sequence(_reach(kind, config, branch), position_ids)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=rows,
            q_length=width,
            kv_length=width,
            mask_function=and_masks(_same_branch(branch), reach),
            allow_is_causal_skip=False,
            dtype=dtype,
            device=branch.device,
            config=config,
        )

    if getattr(config, "layer_types", None):
        return {kind: mask(kind) for kind in sorted(set(config.layer_types))}
    if getattr(config, "sliding_window", None) is not None:
        return mask("sliding_attention")
    return mask("chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention")


def _same_branch(branch: Tensor) -> MaskFunction:
    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = branch[batch, key]
        return (seen == 0) | (seen == branch[batch, query])

    return sees


def _reach(kind: str, config: PreTrainedConfig, branch: Tensor) -> MaskFunction:
    """How far back a kind of layer sees, in positions."""
    if kind == "full_attention":
        return causal_mask_function
    if kind == "sliding_attention":
        return sliding_window_causal_mask_function(config.sliding_window)
    if kind == "chunked_attention":
        return chunked_causal_mask_function(config.attention_chunk_size, branch.new_zeros(len(branch)))
    raise UserError(f"layers of the kind {kind} carry a state from token to token, past the end of an answer")
