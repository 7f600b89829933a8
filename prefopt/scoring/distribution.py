"""What a policy's scoring forward may be told about its reference, beyond the log-probabilities of the targets.

Both are plain classes on purpose, neither tuples nor dataclasses: DDP, FSDP and accelerate convert the tensors that
they find in arguments and results (to half precision, to float32), and look into those but not into these.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Distribution:
    """Next-token distributions at `M` tokens, not yet computed: `softmax(softcap(scale * (hidden head^T + bias)))`.

    `hidden` is `[M, H]`, `head` `[V, H]`, `bias` `[V]` or None; a `softcap` c means `c * tanh(z / c)`, None no cap. A
    reference may have another `H` than the policy, not another `V`. `narrow`: matrix products have operands in bf16 and
    results in float32; decided here, where autocast can be seen, unless it is given.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        narrow: bool | None = None,
    ) -> None:
        self.hidden = hidden
        self.head = head
        self.bias = bias
        self.scale = scale
        self.softcap = softcap
        self.narrow = _wants_narrow(hidden, head) if narrow is None else narrow


class ExpectedRows:
    """A reference distribution q seen through the head it shares with the policy; `expected_rows` makes it.

    `rows` `[M, H]` is the expected row of the head, sum_v q_v W_v; `mean_logit` `[M]` the expected logit without the
    bias, `log_normalizer` `[M]` the log-sum-exp of the logits and `ref_logp` `[M]` the log-probability of the target,
    in nats. All in float32 (float64 for a reference in float64): bf16 rows would give a KL with an error of 1e-3.
    """

    def __init__(self, rows: Tensor, mean_logit: Tensor, log_normalizer: Tensor, ref_logp: Tensor) -> None:
        self.rows = rows
        self.mean_logit = mean_logit
        self.log_normalizer = log_normalizer
        self.ref_logp = ref_logp


def widens(device: torch.device) -> bool:
    """Whether a product of bf16 operands can have a float32 result there: on CUDA, from torch 2.8 on."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype")


def _wants_narrow(hidden: Tensor, head: Tensor) -> bool:
    """Whether both operands come in bf16, or autocast would round them to it."""
    dtypes, device = {hidden.dtype, head.dtype}, hidden.device
    if torch.float64 in dtypes or not widens(device):
        return False
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    return autocast or dtypes == {torch.bfloat16}
