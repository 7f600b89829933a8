"""One pair whose tokens are given by logits, scored by the head that training uses: losses down to the policy's logits.

The head is the identity, so that hidden states are logits. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import Loss, LossOutput, Sides
from prefopt.scoring import TokenScores, score_tokens
from tests.losses.views import Micro

ENTRIES = 7
CHOSEN, REJECTED = slice(0, 4), slice(4, 7)


@dataclass(frozen=True)
class TokenPair:
    """Logits of policy (with gradient) and reference `[M, V]`, targets `[M]`; `kl` is KL(reference || policy)."""

    policy: Tensor
    reference: Tensor
    targets: Tensor
    scores: dict[str, Tensor]
    chosen: int

    @property
    def kl(self) -> Tensor:
        return self.scores["forward_kl"]

    def output(self, loss: Loss, **replaced: Tensor) -> LossOutput:
        """The loss of the pair, with scores replaced by name."""
        scores = {**self.scores, **replaced}
        sequence = (torch.arange(len(self.targets)) >= self.chosen).long()
        sides = Sides(True, 2, len(self.targets), 1, self.chosen)
        output: Any = loss(Micro(TokenScores(2, sequence, **scores), sides, {}).view(loss.needs))
        return output


def token_pair(
    policy: Tensor | None = None,
    reference: Tensor | None = None,
    targets: Sequence[int] | None = None,
    *,
    chosen: int = CHOSEN.stop,
    seed: int = 0,
) -> TokenPair:
    """A pair with these logits and targets, or random ones: four chosen tokens and three rejected, seven entries."""
    rng = torch.Generator().manual_seed(seed)
    random = [torch.randn(REJECTED.stop, ENTRIES, generator=rng, dtype=torch.float64) for _ in range(2)]
    policy = (random[0] if policy is None else policy).clone().requires_grad_()
    reference = random[1] if reference is None else reference
    labels = torch.randint(ENTRIES, (len(policy),), generator=rng) if targets is None else torch.tensor(targets)
    identity = torch.eye(policy.shape[1], dtype=torch.float64)
    statistics = ("logp", "ref_logp", "forward_kl")
    scores = score_tokens(policy, identity, labels, ref_hidden=reference, ref_head=identity, statistics=statistics)
    return TokenPair(policy, reference, labels, scores, chosen)


def value(loss: Loss, pair: TokenPair) -> float:
    return pair.output(loss).loss.item()


def logit_gradient(loss: Loss, pair: TokenPair) -> Tensor:
    """Gradient of the loss at the policy's logits `[M, V]`."""
    (grad,) = torch.autograd.grad(pair.output(loss).loss.sum(), pair.policy, retain_graph=True)
    return grad
