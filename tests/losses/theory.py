"""What tests of single losses share: exact values, answers spelled token by token, gradients, exact optima."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from prefopt.losses import Loss, Sides
from prefopt.scoring.scores import TokenScores
from tests.losses.views import Micro, run, single_tokens

RATIOS = [(-1e4, 1e4), (-80.0, 3.0), (-1.5, 0.25), (0.0, 0.0), (0.7, -0.4), (6.0, 50.0), (300.0, -2.0), (1e4, -1e4)]
"""Log-ratios of chosen and rejected answers, from hopeless to settled."""


def exact(z: float) -> float:
    """L(z) = log(1 + e^-z), to the last bit of a float."""
    if abs(z) > 700:  # e^-z is nothing to a float
        return max(0.0, -z)
    with localcontext() as context:
        context.prec = 400
        return float((1 + (-Decimal(z)).exp()).ln())


def sigmoid(z: float) -> float:
    """S(z) in plain floats, for z that a float can hold the exponential of."""
    return 1 / (1 + math.exp(-z))


def values(loss: Loss, chosen: Sequence[float], rejected: Sequence[float], dtype=torch.float64, **columns) -> Tensor:
    """Values for pairs of one-token answers with these log-ratios."""
    return run(loss, single_tokens(chosen, rejected, dtype=dtype, columns=columns)).loss.detach()


def metrics(loss: Loss, chosen: Sequence[float], rejected: Sequence[float], **columns) -> dict[str, list[float]]:
    """Metrics for the same pairs, as lists."""
    found = run(loss, single_tokens(chosen, rejected, columns=columns)).metrics
    return {name: value.tolist() for name, value in found.items()}


def gradients(loss: Loss, chosen: Sequence[float], rejected: Sequence[float], dtype=torch.float64, **columns):
    """Gradients with respect to the log-probs of the chosen and of the rejected answers, as two lists."""
    micro = single_tokens(chosen, rejected, dtype=dtype, columns=columns)
    (grad,) = torch.autograd.grad(run(loss, micro).loss.sum(), micro.scores.logp)
    return tuple(part.tolist() for part in grad.split(len(chosen)))


def spelled(
    chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]], reference: float | None = None
) -> Micro:
    """Pairs whose answers have these log-probs token by token, under a reference that gives each token the same."""
    answers = [*chosen, *rejected]
    lengths = [len(answer) for answer in answers]
    logp = torch.tensor([token for answer in answers for token in answer], dtype=torch.float64, requires_grad=True)
    sequence = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths))
    ref_logp = None if reference is None else torch.full_like(logp, reference, requires_grad=False)
    sides = Sides(True, len(answers), sum(lengths), len(chosen), sum(lengths[: len(chosen)]))
    scores = TokenScores(len(answers), sequence, logp, ref_logp, turn=torch.zeros_like(sequence))
    return Micro(scores, sides, {})


def token_gradients(loss: Loss, micro: Micro) -> list[float]:
    """Gradient of the summed loss with respect to each token's log-prob."""
    (grad,) = torch.autograd.grad(run(loss, micro).loss.sum(), micro.scores.logp)
    return grad.tolist()


class Bandit:
    """Arms with a reference policy and the probability `wins` `[arms, arms]` that the row's arm beats the column's."""

    def __init__(self, wins: Tensor, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.arms = len(wins)
        self.wins = wins
        self.reference = torch.log_softmax(torch.randn(self.arms, generator=rng, dtype=torch.float64), 0)

    @classmethod
    def bradley_terry(cls, reward: Tensor) -> Bandit:
        """Arm i beats arm j with probability S(reward_i - reward_j)."""
        return cls(torch.sigmoid(reward[:, None] - reward[None, :]))

    def optimum(self, loss: Loss, **columns: Tensor) -> Tensor:
        """The log-policy that minimises the expected loss over all ordered pairs, by Newton's method.

        `columns` are `[arms, arms]`, a value for each ordered pair of arms.
        """
        first, second = (~torch.eye(self.arms, dtype=torch.bool)).nonzero().T
        laid_out = {name: column[first, second] for name, column in columns.items()}

        def expected(logits: Tensor) -> Tensor:
            policy = torch.log_softmax(logits, 0)
            size = 2 * len(first)
            arms = torch.cat([first, second])
            scores = TokenScores(size, torch.arange(size), policy[arms], self.reference[arms])
            micro = Micro(scores, Sides(True, size, size, len(first), len(first)), laid_out)
            return (run(loss, micro).loss * self.wins[first, second]).sum()

        return torch.log_softmax(newton(expected, self.reference.clone()), 0)


def newton(function: Callable[[Tensor], Tensor], start: Tensor, steps: int = 40) -> Tensor:
    """A minimum of a function that is smooth, and convex but for directions that do not matter to it."""
    point = start
    for _ in range(steps):
        slope = torch.autograd.functional.jacobian(function, point)
        curvature = torch.autograd.functional.hessian(function, point)
        step = torch.linalg.pinv(curvature, rtol=1e-10) @ slope
        point = point - step
        if step.abs().max() < 1e-13:
            break
    return point
