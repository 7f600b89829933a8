"""What a policy's scoring forward may be told about its reference, beyond the log-probabilities of the targets.

Both are plain classes on purpose, neither tuples nor dataclasses: DDP, FSDP and accelerate convert the tensors that
they find in arguments and results (to half precision, to float32), and look into those but not into these.
"""

from __future__ import annotations

from torch import Tensor


class Distribution:
    """Next-token distributions at `M` tokens, not yet computed: `softmax(softcap(scale * (hidden head^T + bias)))`.

    `hidden` is `[M, H]`, `head` `[V, H]`, `bias` `[V]` or None; a `softcap` c means `c * tanh(z / c)`, None no cap. A
    reference may have another `H` than the policy, not another `V`.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.hidden = hidden
        self.head = head
        self.bias = bias
        self.scale = scale
        self.softcap = softcap


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
