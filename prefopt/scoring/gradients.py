"""The backward pass over the vocabulary: tiles are made again, turned into gradients at the logits, and multiplied out.

With p, q the distributions of policy and reference and y the target, the gradients at the policy's logits are

    logp          1[v = y] - p_v                      entropy     -p_v (log p_v + entropy)
    log-sum-exp   p_v                                 KL(q || p)  p_v - q_v
                                                      KL(p || q)  p_v (log p_v - log q_v - KL(p || q))

and sum to `g 1[v = y] + p_v (...) - g_kl q_v`. So a token without an incoming gradient at KL(q || p) (of a chosen
answer in TDPO2) needs no tile of the reference, and one with equal gradients at logp and KL(q || p) (every token in
TDPO1) none of the policy. Tokens are sorted into parts by what they need. That waits for the device once, and only
where two models are compared; the matrix products that it saves take longer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefopt.scoring.tiles import Operands, TiledLogits, in_tile, slices, tiles


@dataclass(frozen=True)
class Upstream:
    """What the backward pass knows of each token, `[M]` each: target, results of the forward pass, incoming gradients.

    Gradients that are None are zero everywhere. `ref_lse` is None where no divergence has a gradient.
    """

    targets: Tensor
    lse: Tensor
    grad_logp: Tensor
    grad_lse: Tensor | None = None
    entropy: Tensor | None = None
    grad_entropy: Tensor | None = None
    ref_lse: Tensor | None = None
    reverse_kl: Tensor | None = None
    grad_forward: Tensor | None = None
    grad_reverse: Tensor | None = None

    def at(self, tokens: Tensor | slice) -> Upstream:
        """The same for some of the tokens."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Upstream(**{name: value[tokens] for name, value in given.items() if value is not None})

    @property
    def needs(self) -> tuple[Tensor, Tensor]:
        """Which tokens need tiles of the policy, and which of the reference: two masks `[M]`."""
        reads_policy, reads_reference = self.grad_normalizer != 0, torch.zeros_like(self.lse, dtype=torch.bool)
        if self.grad_entropy is not None:
            reads_policy |= self.grad_entropy != 0
        if self.grad_reverse is not None:
            reads_policy |= self.grad_reverse != 0
            reads_reference |= self.grad_reverse != 0
        if self.grad_forward is not None:
            reads_reference |= self.grad_forward != 0
        return reads_policy, reads_reference

    @property
    def grad_normalizer(self) -> Tensor:
        """The factor of p_v that is the same for all v."""
        total = -self.grad_logp
        for gradient in (self.grad_lse, self.grad_forward):
            total = total if gradient is None else total + gradient
        return total

    def at_logits(self, z: Tensor | None, r: Tensor | None, columns: slice) -> Tensor:
        """Gradient at a tile of the policy's logits `z` beside the reference's `r`; overwrites both.

        `self` holds the tile's tokens. A tile that does not matter to any of them is None.
        """
        log_q = None if r is None or self.ref_lse is None else r.sub_(_column(self.ref_lse))
        gradient = None if z is None else self._from_policy_(z, log_q)
        if log_q is not None and self.grad_forward is not None:
            from_reference = log_q.exp_().mul_(_column(-self.grad_forward))
            gradient = from_reference if gradient is None else gradient.add_(from_reference)
        assert gradient is not None
        index, inside = in_tile(self.targets, columns)
        return gradient.scatter_add_(1, index, _column(self.grad_logp * inside))

    def _from_policy_(self, z: Tensor, log_q: Tensor | None) -> Tensor:
        """The terms with a factor p_v; overwrites `z`."""
        log_p = z.sub_(_column(self.lse))
        factor = _column(self.grad_normalizer)
        if self.grad_entropy is not None and self.entropy is not None:
            factor = factor - (log_p + _column(self.entropy)).mul_(_column(self.grad_entropy))
        if self.grad_reverse is not None and self.reverse_kl is not None and log_q is not None:
            excess = (log_p - log_q).sub_(_column(self.reverse_kl))
            factor = factor + excess.mul_(_column(self.grad_reverse))
        return log_p.exp_().mul_(factor)


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(1)


class _Part:
    """Tokens that need the same tiles, and the gradient of their hidden states."""

    def __init__(
        self,
        tokens: Tensor | slice,
        upstream: Upstream,
        policy: TiledLogits,
        reference: TiledLogits | None,
        *,
        reads_policy: bool = True,
        for_hidden: bool,
    ) -> None:
        self.tokens = tokens
        self.upstream = upstream.at(tokens)
        self.policy, self.reference = policy.at(tokens), None if reference is None else reference.at(tokens)
        self.reads_policy = reads_policy
        self.grad_hidden = torch.zeros_like(self.policy.hidden, dtype=policy.dtype) if for_hidden else None

    def __len__(self) -> int:
        return len(self.upstream.targets)

    def at_products(self, rows: slice, columns: slice, ours: Operands, theirs: Operands | None) -> Tensor:
        """Gradient at a tile of `hidden weight^T + bias`, before scale and cap."""
        z = self.policy.logits(rows, ours) if self.reads_policy else None
        r = None if self.reference is None or theirs is None else self.reference.logits(rows, theirs)
        slope = self.policy.slope(z)
        gradient = self.upstream.at(rows).at_logits(z, r, columns)
        return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


def _parts(upstream: Upstream, policy: TiledLogits, reference: TiledLogits | None, for_hidden: bool) -> list[_Part]:
    """All tokens that have a gradient, sorted by the tiles they need."""
    if reference is None:
        return [_Part(slice(0, len(upstream.targets)), upstream, policy, None, for_hidden=for_hidden)]
    reads_policy, reads_reference = upstream.needs
    if policy.softcap is not None:
        reads_policy |= reads_reference  # the slope of the cap is a function of the policy's logits
    kind = reads_policy + 2 * reads_reference
    sizes = torch.stack([(kind == each).sum() for each in range(4)]).tolist()
    parts = []
    for each, tokens in enumerate(kind.argsort(stable=True).split(sizes)):
        if each and len(tokens):
            needed = reference if each >= 2 else None
            parts.append(_Part(tokens, upstream, policy, needed, reads_policy=each != 2, for_hidden=for_hidden))
    return parts


def gradients(
    policy: TiledLogits, reference: TiledLogits | None, upstream: Upstream, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states and bias in `policy.dtype` and of the weight in its own, or None where not needed.

    The vocabulary is the outer loop, so each slice of the weight's gradient is summed over all tokens in `policy.dtype`
    and rounded once, and no float32 copy of a whole bf16 gradient exists.
    """
    for_hidden, for_weight, for_bias = needed
    grad_weight = torch.empty_like(policy.weight) if for_weight else None
    grad_bias = torch.zeros_like(policy.bias, dtype=policy.dtype) if for_bias and policy.bias is not None else None
    parts = _parts(upstream, policy, reference, for_hidden)
    row_step, column_tiles = tiles(policy, reference)
    for columns in column_tiles:
        ours = policy.operands(columns)
        theirs = None if reference is None else reference.operands(columns)
        weight_sum = torch.zeros_like(ours[0], dtype=policy.dtype) if for_weight else None
        for part in parts:
            for rows in slices(len(part), row_step):
                dz = part.at_products(rows, columns, ours, theirs)
                if part.grad_hidden is not None:
                    part.grad_hidden[rows] += policy.product(dz, ours[0])
                if weight_sum is not None:
                    weight_sum += policy.product(dz.t(), part.policy.hidden[rows])
                if grad_bias is not None:
                    grad_bias[columns] += dz.sum(0)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[columns] = weight_sum
    return _joined(parts, policy) if for_hidden else None, grad_weight, grad_bias


def _joined(parts: list[_Part], policy: TiledLogits) -> Tensor:
    """The gradients of all parts' hidden states in the order of the tokens; 0 for tokens in no part."""
    joined = torch.zeros_like(policy.hidden, dtype=policy.dtype)
    for part in parts:
        if part.grad_hidden is not None:
            joined[part.tokens] = part.grad_hidden
    return joined
