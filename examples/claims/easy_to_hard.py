"""Stepwise DPO: easy pairs first, hard ones first, a random half first, or all at once (arXiv 2403.19270).

    python examples/claims/easy_to_hard.py [--seeds 8]

A log-linear policy whose features see the reward dimly at the start, and two sources of pairs from a Bradley-Terry
model on 400 prompts: an easy one of answers far apart in reward, and a hard one of answers close together, whose labels
are noisier for it. Each step starts from the policy of the step before and has it as its reference. All ways take as
many steps of the optimizer. Reward and KL to the start are on 500 new prompts; since every reference moves, two steps
drift further than one run of the same beta, so the last column is the reward of a run at once with the beta that takes
it to the same KL. Takes about half a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from common import answers, conclude, minimise, seeds, show, told
from torch import Tensor

from prefopt.losses import Pairs, make

torch.set_default_dtype(torch.float64)

PROMPTS, NEW, CHOICES, FEATURES, PAIRS = 400, 500, 8, 10, 3
BETA, STEPS, RATE = 0.3, 200, 0.05
BETAS = (0.4, 0.3, 0.22, 0.16, 0.12, 0.09, 0.06, 0.04)
Rows = tuple[Tensor, Tensor, Tensor]


def source(reward: Tensor, rng: torch.Generator, *, easy: bool) -> Rows:
    """Prompt, chosen and rejected answer of pairs that are far apart in reward, or close together."""
    ranked = reward[:PROMPTS].argsort(1)
    prompt = torch.arange(PROMPTS).repeat_interleave(PAIRS)
    low = torch.randint(0, 2 if easy else CHOICES - 2, prompt.shape, generator=rng)
    high = low + (CHOICES - 2 if easy else 2)
    better, worse = ranked[prompt, high], ranked[prompt, low]
    right = torch.rand(len(prompt), generator=rng) < torch.sigmoid(reward[prompt, better] - reward[prompt, worse])
    return prompt, torch.where(right, better, worse), torch.where(right, worse, better)


def objective(features: Tensor, before: Tensor, rows: Rows, beta: float) -> Callable[[Tensor], Tensor]:
    """DPO's mean over the pairs, as a function of the weights; the policy of the weights `before` is the reference."""
    loss, (prompt, *sides) = make("dpo", beta=beta), rows
    reference = torch.log_softmax(features[:PROMPTS] @ before, 1)

    def mean(weights: Tensor) -> Tensor:
        policy = torch.log_softmax(features[:PROMPTS] @ weights, 1)
        return loss(Pairs(*(answers(policy, reference, prompt, side) for side in sides))).loss.mean()

    return mean


def stepwise(features: Tensor, start: Tensor, chunks: list[Rows], beta: float) -> Tensor:
    """The weights after a run on each chunk, each from and against the policy of the one before."""
    weights = start
    for rows in chunks:
        weights = minimise(objective(features, weights, rows, beta), weights, STEPS // len(chunks), RATE)
    return weights


def halves(rows: Rows, rng: torch.Generator) -> list[Rows]:
    """Two random halves."""
    order = torch.randperm(len(rows[0]), generator=rng)
    return [tuple(part[half] for part in rows) for half in order.chunk(2)]  # type: ignore[misc]


def run(seed: int) -> dict[str, dict[str, float]]:
    """Reward, KL and the reward at once at that KL, of each way."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(PROMPTS + NEW, CHOICES, FEATURES, generator=rng)
    direction = torch.randn(FEATURES, generator=rng)
    reward = features @ (2.2 * direction / direction.norm())
    start = 0.2 * direction / direction.norm() + 0.1 * torch.randn(FEATURES, generator=rng)
    easy, hard = source(reward, rng, easy=True), source(reward, rng, easy=False)
    both: Rows = tuple(torch.cat(parts) for parts in zip(easy, hard, strict=True))  # type: ignore[assignment]
    first = torch.log_softmax(features[PROMPTS:] @ start, 1)

    def figures(weights: Tensor) -> tuple[float, float]:
        policy = torch.log_softmax(features[PROMPTS:] @ weights, 1)
        gain = ((policy.exp() - first.exp()) * reward[PROMPTS:]).sum(1).mean()
        return float(gain), float((policy.exp() * (policy - first)).sum(1).mean())

    frontier = sorted((kl, gain) for gain, kl in (figures(stepwise(features, start, [both], beta)) for beta in BETAS))
    ways = {
        "all at once": [both],
        "easy to hard": [easy, hard],
        "hard to easy": [hard, easy],
        "random halves": halves(both, rng),
    }
    found = {}
    for name, chunks in ways.items():
        gain, kl = figures(stepwise(features, start, chunks, BETA))
        found[name] = {"gain": gain, "kl": kl, "at once": float(np.interp(kl, *zip(*frontier, strict=True)))}
    return found


def ahead(differences: list[float]) -> bool:
    """Whether differences within the seeds are above 0 by more than two standard errors."""
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.mean(differences) > 2 * spread / len(differences) ** 0.5


def main() -> None:
    """Print the table, and whether the order matters as the paper found."""
    runs = [run(seed) for seed in seeds(__doc__, default=8)]
    show(
        ["", "gain in reward", "KL to the start, nats", "at once at this KL"],
        [[name, *(told([each[name][key] for each in runs]) for key in ("gain", "kl", "at once"))] for name in runs[0]],
    )

    def beats(one: str, other: str) -> bool:
        return ahead([each[one]["gain"] - each[other]["gain"] for each in runs])

    conclude("easy to hard beats everything at once, at equal beta", beats("easy to hard", "all at once"))
    conclude("easy to hard beats random halves", beats("easy to hard", "random halves"))
    conclude("easy to hard beats hard to easy", beats("easy to hard", "hard to easy"))
    equal = [each["easy to hard"]["gain"] - each["easy to hard"]["at once"] for each in runs]
    conclude("easy to hard beats everything at once, at equal KL", ahead(equal))


if __name__ == "__main__":
    main()
