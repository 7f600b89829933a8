"""The forward KL from a reference that shares the policy's frozen head, without a second pass over the vocabulary.

With one head `W`, bias `b` and scale `s` for both models, the logits are z = s (W h + b) and r = s (W h_ref + b). The
mean of z under the reference q is then a dot product with the expected row `w = sum_v q_v W_v`, which the policy does
not enter, and the bias drops out of the difference:

    KL(q || p) = E_q[r - z] + lse(z) - lse(r) = (lse(z) - lse(r)) - (s h . w - s h_ref . w)

Both brackets are of the size of the change of the policy, not of the logits, which is what keeps float32 exact to about
1e-6. It holds for the same values of W and b in both models, and without a soft cap, which is not linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.sums import RunningSums
from prefopt.scoring.tiles import TiledLogits, full_precision, slices, sum_dtype, tiles


@torch.no_grad()
def expected_rows(reference: Distribution, targets: Tensor) -> ExpectedRows:
    """The expected head rows of a reference at `M` tokens with `targets` `[M]`, tile by tile.

    Raises `UserError` for a reference with a soft cap.
    """
    _refuse_cap(reference)
    with full_precision(reference.hidden):
        model = TiledLogits(reference, sum_dtype(reference))
        sums = RunningSums(model, targets)
        rows = torch.zeros_like(model.hidden, dtype=model.dtype)
        row_step, column_tiles = tiles(model)
        for columns in column_tiles:
            operands = model.operands(columns)
            for tokens in slices(len(targets), row_step):
                weights, shrink = sums.add_(model.logits(tokens, operands), tokens, columns)
                rows[tokens] = rows[tokens] * shrink.unsqueeze(1) + _whole_product(model, weights, operands[0])
        rows /= sums.mass.unsqueeze(1)
        mean_logit = model.scale * torch.linalg.vecdot(model.hidden.to(model.dtype), rows)
    return ExpectedRows(rows, mean_logit, sums.lse, sums.logp)


def _whole_product(model: TiledLogits, weights: Tensor, head: Tensor) -> Tensor:
    """A product whose left side keeps the digits that narrow operands drop: the KL is a difference of such products."""
    if not model.narrow:
        return model.product(weights, head)
    coarse = weights.to(model.operand_dtype)
    return model.product(coarse, head) + model.product(weights - coarse.to(weights), head)


def expected_forward_kl(policy: Distribution, lse: Tensor, reference: ExpectedRows) -> Tensor:
    """KL(reference || policy) `[M]` in nats, differentiable in `policy.hidden`.

    `lse` `[M]` is the log-sum-exp of the policy's logits, differentiable likewise. The policy's head must hold the
    values that made the reference's rows, which cannot be seen here; a head that trains and a soft cap can be, and
    raise `UserError`.
    """
    _refuse_cap(policy)
    if policy.head.requires_grad or (policy.bias is not None and policy.bias.requires_grad):
        raise UserError(
            "the policy's output head trains, so the reference's expected head rows do not fit it. Freeze the head "
            "(LoRA on other layers), or write reference: {source: live}"
        )
    with full_precision(policy.hidden):
        # As the logits saw it, or the two brackets would be of different functions.
        hidden = policy.hidden.to(torch.bfloat16) if policy.narrow else policy.hidden
        mean_logit = policy.scale * torch.linalg.vecdot(hidden.to(lse.dtype), reference.rows.to(lse.dtype))
    return (lse - reference.log_normalizer) - (mean_logit - reference.mean_logit)


def _refuse_cap(model: Distribution) -> None:
    if model.softcap is not None:
        raise UserError(
            "this model caps its logits, so expected head rows do not give its divergences. Write "
            "reference: {source: live}"
        )
