"""How far two computations of the same log-probabilities may lie apart."""

from __future__ import annotations

import math

import torch
from torch import nn

# Rounding alone. The constant covers the depth of a model; ten times the bound is more than rounding can explain.
_ROUNDING = 8.0
BEYOND = 10.0


def rounding_bound(model: nn.Module, mixed_precision: str, tokens: int) -> float:
    """Nats by which the log-probability of an answer of `tokens` scored tokens may change with kernel and layout."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    eps = max(torch.finfo(dtype).eps, torch.finfo(mixed).eps if mixed else 0.0)
    return _ROUNDING * eps * math.sqrt(max(1, tokens))
