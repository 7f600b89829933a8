"""KTO against DPO on the same answers, and with one answer of each pair (arXiv 2402.01306).

    python examples/claims/kto_against_dpo.py [--seeds 8]

A log-linear policy, 400 prompts with eight answers of ten features each, three pairs a prompt from a Bradley-Terry
model. The figure is the gain in reward over the uniform policy on 500 new prompts. KTO reads the answers of the pairs
one by one, or a single one of each pair, half as many. Takes about a minute.
"""

from __future__ import annotations

import statistics

import torch
from common import answers, conclude, minimise, seeds, show, told
from torch import Tensor

from prefopt.losses import Completions, Pairs, make

torch.set_default_dtype(torch.float64)

PROMPTS, NEW, CHOICES, FEATURES, PAIRS = 400, 500, 8, 10, 3
UNIFORM = torch.log_softmax(torch.zeros(PROMPTS, CHOICES), 1)
DPO, KTO = make("dpo", beta=0.1), make("kto", beta=0.1)


def dpo_loss(policy: Tensor, prompt: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """DPO's mean over pairs."""
    return DPO(Pairs(*(answers(policy, UNIFORM, prompt, side) for side in (chosen, rejected)))).loss.mean()


def kto_loss(policy: Tensor, prompt: Tensor, answer: Tensor, good: Tensor) -> Tensor:
    """KTO's mean over answers; its reference point comes from each prompt with the answer of the next row."""
    with torch.no_grad():
        others = Completions(answers(policy, UNIFORM, prompt, answer.roll(1)))
        total, count = KTO.estimates(others)["kl"]
    scores = answers(policy, UNIFORM, prompt, answer)
    return KTO(Completions(scores, desirable=good, estimates={"kl": total / count})).loss.mean()


def run(seed: int) -> dict[str, float]:
    """Gain in reward of each way to learn from the same judgements."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(PROMPTS + NEW, CHOICES, FEATURES, generator=rng)
    direction = torch.randn(FEATURES, generator=rng)
    reward = features @ (2.2 * direction / direction.norm())
    prompt = torch.arange(PROMPTS).repeat_interleave(PAIRS)
    two = torch.stack([torch.randperm(CHOICES, generator=rng)[:2] for _ in prompt]).T
    gap = reward[prompt, two[0]] - reward[prompt, two[1]]
    right = torch.rand(len(prompt), generator=rng) < torch.sigmoid(gap)
    chosen, rejected = torch.where(right, *two), torch.where(right, *two.flip(0))
    keep = torch.rand(len(prompt), generator=rng) < 0.5

    def gain(weights: Tensor) -> float:
        policy = torch.softmax(features[PROMPTS:] @ weights, 1)
        return float(((policy - 1 / CHOICES) * reward[PROMPTS:]).sum(1).mean())

    def learnt(loss, *data: Tensor) -> float:
        def mean(weights: Tensor) -> Tensor:
            return loss(torch.log_softmax(features[:PROMPTS] @ weights, 1), *data)

        return gain(minimise(mean, torch.zeros(FEATURES), steps=300, rate=0.1))

    both, order = torch.cat([chosen, rejected]), torch.randperm(2 * len(prompt), generator=rng)
    good = torch.arange(2 * len(prompt)) < len(prompt)
    return {
        "dpo, all pairs": learnt(dpo_loss, prompt, chosen, rejected),
        "kto, the same answers": learnt(kto_loss, prompt.repeat(2)[order], both[order], good[order]),
        "kto, one answer a pair": learnt(kto_loss, prompt, torch.where(keep, chosen, rejected), keep),
        "best possible": float((reward[PROMPTS:].max(1).values - reward[PROMPTS:].mean(1)).mean()),
    }


def main() -> None:
    """Print the table, and which shares of DPO's gain KTO reached."""
    runs = [run(seed) for seed in seeds(__doc__, default=8)]
    means = {name: statistics.mean(each[name] for each in runs) for name in runs[0]}
    dpo = means["dpo, all pairs"]
    show(
        ["", "gain in reward", "share of dpo's"],
        [[name, told([each[name] for each in runs]), f"{means[name] / dpo:.1%}"] for name in runs[0]],
    )
    conclude("KTO reaches 98 % of DPO's gain on the same answers", means["kto, the same answers"] >= 0.98 * dpo)
    conclude("KTO reaches 95 % of it with one answer of each pair", means["kto, one answer a pair"] >= 0.95 * dpo)
    conclude("KTO beats DPO", means["kto, the same answers"] > dpo)


if __name__ == "__main__":
    main()
