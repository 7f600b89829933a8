"""Conversations spelled turn by turn, for the losses that read turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.losses import Loss, Sides
from prefopt.scoring.scores import TokenScores
from tests.losses.views import Micro, run

Turns = Sequence[Sequence[float]]


def conversation(
    chosen: Turns,
    rejected: Turns,
    *,
    segments: tuple[Sequence[float], Sequence[float]] | None = None,
    more: Sequence[tuple[Turns, Turns]] = (),
) -> Micro:
    """A pair whose tokens have these log-ratios, turn by turn, and `more` such pairs; the reference gives each -2.

    `segments`: the weight of each turn of the two sides, of the first pair.
    """
    pairs = [(chosen, rejected), *more]
    answers = [pair[side] for side in (0, 1) for pair in pairs]
    lengths = [sum(map(len, answer)) for answer in answers]
    ratios = [value for answer in answers for turn in answer for value in turn]
    logp = (torch.tensor(ratios, dtype=torch.float64) - 2.0).requires_grad_()
    segment = None
    if segments is not None:
        weights = [weight for side, turns in zip(segments, answers, strict=True)
                   for weight, turn in zip(side, turns, strict=True) for _ in turn]  # fmt: skip
        segment = torch.tensor(weights, dtype=torch.float64)
    scores = TokenScores(
        len(answers),
        torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths)),
        logp,
        torch.full_like(logp, -2.0, requires_grad=False),
        turn=torch.tensor([number for answer in answers for number, turn in enumerate(answer) for _ in turn]),
        segment=segment,
    )
    first = sum(lengths[: len(pairs)])
    return Micro(scores, Sides(True, len(answers), sum(lengths), len(pairs), first), {})


def flat_gradient(loss: Loss, micro: Micro) -> Tensor:
    """Gradient of the summed loss by each token's log-probability."""
    return torch.autograd.grad(run(loss, micro).loss.sum(), micro.scores.logp)[0]
