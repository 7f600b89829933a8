"""How far two computations of the same log-probabilities may lie apart."""

from __future__ import annotations

import math

import torch
from torch import nn

# Rounding alone. The constant covers the depth of a model; ten times the bound is more than rounding can explain.
_ROUNDING = 8.0
BEYOND = 10.0
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rounding_bound(model: nn.Module, mixed_precision: str, tokens: int) -> float:
    """Nats by which the log-probability of an answer of `tokens` scored tokens may change with kernel and layout."""
    parameters = list(model.parameters())
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    dtypes |= {torch.bfloat16} if any(not parameter.is_floating_point() for parameter in parameters) else set()
    dtypes |= {dtype} if (dtype := _MIXED.get(mixed_precision)) else set()
    if torch.backends.cuda.matmul.allow_tf32 and any(parameter.is_cuda for parameter in parameters):
        dtypes.add(torch.float16)  # TF32 has its precision
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return _ROUNDING * eps * math.sqrt(max(1, tokens))
