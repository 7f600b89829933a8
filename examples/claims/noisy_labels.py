"""rDPO against DPO and cDPO when labels were flipped at a known rate (arXiv 2403.00409).

    python examples/claims/noisy_labels.py [--seeds 10]

Twelve answers to one prompt, 4,000 pairs drawn from a Bradley-Terry model of a known reward, labels flipped with
probability 0, 0.2 and 0.4. The figure is the regret: what a policy lacks of the best value of reward - beta KL, which
is known exactly. 0 is perfect. Takes about a minute.
"""

from __future__ import annotations

import statistics

import torch
from common import answers, conclude, minimise, seeds, show, told
from torch import Tensor

from prefopt.losses import Loss, Pairs, make

torch.set_default_dtype(torch.float64)

ANSWERS, PAIRS, BETA, RATES = 12, 4000, 0.5, (0.0, 0.2, 0.4)


def losses(rate: float) -> dict[str, Loss]:
    """The three losses; cDPO and rDPO are told the true rate."""
    smoothed = {name: make(name, beta=BETA, label_smoothing=rate) for name in ("cdpo", "rdpo")}
    return {"dpo": make("dpo", beta=BETA), **smoothed}


def regret(logp: Tensor, reference: Tensor, reward: Tensor) -> float:
    """The best value of reward - beta KL(policy || reference), less that of the policy."""
    best = BETA * torch.logsumexp(reference + reward / BETA, 0)
    return float(best - (logp.exp() * (reward - BETA * (logp - reference))).sum())


def run(seed: int, rate: float) -> dict[str, float]:
    """Regret of each loss on the same pairs."""
    rng = torch.Generator().manual_seed(seed)
    reward = torch.randn(ANSWERS, generator=rng)
    reference = torch.log_softmax(torch.zeros(ANSWERS), 0)
    first = torch.randint(ANSWERS, (PAIRS,), generator=rng)
    second = (first + torch.randint(1, ANSWERS, (PAIRS,), generator=rng)) % ANSWERS
    right = torch.rand(PAIRS, generator=rng) < torch.sigmoid(reward[first] - reward[second])
    right ^= torch.rand(PAIRS, generator=rng) < rate
    chosen, rejected = torch.where(right, first, second), torch.where(right, second, first)

    found = {}
    for name, loss in losses(rate).items():

        def mean(logits: Tensor, loss: Loss = loss) -> Tensor:
            policy = torch.log_softmax(logits, 0)
            sides = (answers(policy, reference, side) for side in (chosen, rejected))
            return loss(Pairs(*sides)).loss.mean()

        logits = minimise(mean, reference, steps=300, rate=0.1)
        found[name] = regret(torch.log_softmax(logits, 0), reference, reward)
    return found


def main() -> None:
    """Print the table, and whether rDPO was the best at both rates of flips."""
    given = seeds(__doc__, default=10)
    found = {rate: [run(seed, rate) for seed in given] for rate in RATES}
    lines = []
    for rate, runs in found.items():
        wins = sum(each["rdpo"] < min(each["dpo"], each["cdpo"]) for each in runs)
        lines.append([f"{rate:.0%}", *(told([each[name] for each in runs]) for name in runs[0]), f"{wins}/{len(runs)}"])
    show(["flipped", "dpo", "cdpo", "rdpo", "rdpo best"], lines)
    means = {
        rate: {name: statistics.mean(each[name] for each in runs) for name in runs[0]} for rate, runs in found.items()
    }
    noisy = [means[rate] for rate in RATES if rate]
    conclude("with flipped labels rDPO beats DPO and cDPO", all(m["rdpo"] < min(m["dpo"], m["cdpo"]) for m in noisy))
    conclude("with flipped labels cDPO beats DPO", all(m["cdpo"] < m["dpo"] for m in noisy))


if __name__ == "__main__":
    main()
