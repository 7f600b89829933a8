"""Formulas shared by several losses: unreduced, differentiable, and stable wherever their value is representable.

Letters as in the papers: `a`, `b` log-ratios of the chosen and the rejected answer, `h = a - b` the margin in nats,
`S` the logistic function, `L(z) = -log S(z)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.views import Pairs
from prefopt.scoring.scores import TokenScores


def logistic(z: Tensor) -> Tensor:
    """L(z) = -log S(z) = log(1 + e^-z). softplus(-z) would turn into the straight line -z from -z = 20 on."""
    return -F.logsigmoid(z)


def soft_logistic(z: Tensor, probability: Tensor | float) -> Tensor:
    """p L(z) + (1 - p) L(-z): the cross-entropy of S(z) against a label that is true with probability p."""
    return probability * logistic(z) + (1 - probability) * logistic(-z)


def token_nll(scores: TokenScores) -> Tensor:
    """-log pi of every scored token, `[M]`, times the token's weight where there is one."""
    return -scores.logp if scores.token_weight is None else -scores.logp * scores.token_weight


@torch.no_grad()
def pair_metrics(view: Pairs, chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """What every pair loss logs, `[B]` each, TRL's names where TRL has one.

    `rewards/*` are the loss's own rewards; a tie is no hit in `rewards/accuracies`. `logps/*` are sums over tokens.
    `logratios/*`, for losses with a reference, are log pi - log ref in nats, so that losses with different rewards
    can be laid side by side.
    """
    metrics = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": (chosen_reward > rejected_reward).to(chosen_reward.dtype),
        "rewards/margins": chosen_reward - rejected_reward,
        "logps/chosen": view.chosen.total("logp"),
        "logps/rejected": view.rejected.total("logp"),
    }
    if "ref_logp" in view.chosen.statistics:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        metrics |= {"logratios/chosen": a, "logratios/rejected": b, "logratios/margin": a - b}
    return metrics
