"""`activation_offloading`: what the backward pass needs waits in the machine's memory, with TRL's manager."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from prefopt.config import PreferenceConfig


def offloading(model: nn.Module, args: PreferenceConfig) -> AbstractContextManager[Any]:
    """What a training step runs in; it may be entered for every step.

    Only what the backbone keeps is worth moving: the head keeps nothing of the vocabulary's size (see `score_tokens`).
    """
    if not args.activation_offloading:
        return nullcontext()
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    manager: AbstractContextManager[Any] = get_act_offloading_ctx_manager(model, warn_if_no_head=False)
    return manager
