"""IPO against DPO when preferences never contradict each other (arXiv 2310.12036, section 5).

    python examples/claims/deterministic_preferences.py [--seeds 3]

Three answers in a strict order, each pair once, a uniform reference, starting policies drawn by the seed. DPO's margins
grow for ever, so that the best answer ends with probability 1 whatever beta is. IPO's stop where beta says. Takes half
a minute.
"""

from __future__ import annotations

import torch
from common import answers, conclude, minimise, seeds, show, told
from torch import Tensor

from prefopt.losses import Pairs, make

torch.set_default_dtype(torch.float64)

BETAS, STEPS = (0.1, 0.5, 1.0), 1000
CHOSEN, REJECTED = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
REFERENCE = torch.log_softmax(torch.zeros(3), 0)


def run(name: str, beta: float, seed: int) -> list[Tensor]:
    """The log-policy half-way and at the end."""
    loss = make(name, beta=beta)

    def mean(logits: Tensor) -> Tensor:
        policy = torch.log_softmax(logits, 0)
        return loss(Pairs(*(answers(policy, REFERENCE, side) for side in (CHOSEN, REJECTED)))).loss.mean()

    start = 0.3 * torch.randn(3, generator=torch.Generator().manual_seed(seed))
    half = minimise(mean, start, steps=STEPS // 2, rate=0.02)
    return [torch.log_softmax(logits, 0) for logits in (half, minimise(mean, half, steps=STEPS // 2, rate=0.02))]


def optimum(beta: float) -> float:
    """Probability of the best answer at IPO's minimum: the three win 5/6, 1/2 and 1/6 of draws from the reference."""
    return float(torch.softmax(torch.tensor([5.0, 3.0, 1.0]) / 6 / beta, 0)[0])


def main() -> None:
    """Print the table, and whether IPO stayed bounded where DPO did not."""
    given, lines, as_claimed = seeds(__doc__, default=3), [], []
    for beta in BETAS:
        for name in ("dpo", "ipo"):
            runs = [run(name, beta, seed) for seed in given]
            best = [float(end[0].exp()) for _, end in runs]
            margins = [float(end[0] - end[2]) for _, end in runs]
            grown = [margin - float(half[0] - half[2]) for margin, (half, _) in zip(margins, runs, strict=True)]
            lines.append([name, f"{beta:g}", told(best), told(margins, 2), told(grown, 2)])
            if name == "dpo":
                as_claimed += [min(best) > 0.99, min(grown) > 0.5]
            else:
                as_claimed += [max(abs(share - optimum(beta)) for share in best) < 0.01, max(map(abs, grown)) < 0.1]
    show(["loss", "beta", "best answer's probability", "margin, nats", "grown in the last half"], lines)
    print("IPO's minimum, exactly: " + ", ".join(f"{optimum(beta):.3f} at beta {beta:g}" for beta in BETAS))
    conclude("IPO stays bounded on deterministic preferences, DPO does not", all(as_claimed))


if __name__ == "__main__":
    main()
