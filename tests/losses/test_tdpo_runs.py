"""A small world, trained in a second: what TDPO does to the divergence that DPO lets grow."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from prefopt.losses import Objective, Sides, make
from prefopt.scoring import TokenScores, score_tokens

ENTRIES, LENGTH, PAIRS, BETA = 12, 10, 80, 0.1


def walks(table: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Sequences `[count, LENGTH + 1]` of a Markov chain with these logits `[ENTRIES, ENTRIES]`, all begun at 0."""
    tokens = torch.zeros(count, 1, dtype=torch.int64)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, torch.multinomial(table[tokens[:, -1]].softmax(-1), 1, generator=rng)], 1)
    return tokens


@cache
def world() -> tuple[Tensor, Tensor]:
    """A random chain, the reference, and pairs of its walks, chosen ones first, by a reward that sums over tokens."""
    rng = torch.Generator().manual_seed(0)
    reference = 1.5 * torch.randn(ENTRIES, ENTRIES, generator=rng)
    valence = torch.randn(ENTRIES, generator=rng)
    one, other = walks(reference, PAIRS, rng), walks(reference, PAIRS, rng)
    gap = valence[one[:, 1:]].sum(1) - valence[other[:, 1:]].sum(1)
    wins = (torch.rand(PAIRS, generator=rng) < torch.sigmoid(gap)).unsqueeze(1)
    return reference, torch.cat([torch.where(wins, one, other), torch.where(wins, other, one)])


def scores_of(policy: Tensor, reference: Tensor, sequences: Tensor) -> TokenScores:
    """Scores of all walks; a policy is the chain's logits, looked up by the token before."""
    before, after = sequences[:, :-1].flatten(), sequences[:, 1:].flatten()
    identity = torch.eye(ENTRIES)
    statistics = ("logp", "ref_logp", "forward_kl")
    found = score_tokens(
        policy[before], identity, after, ref_hidden=reference[before], ref_head=identity, statistics=statistics
    )
    return TokenScores(len(sequences), torch.arange(len(sequences)).repeat_interleave(LENGTH), **found)


@cache
def trained(name: str, **knobs: float) -> dict[str, float]:
    """SeqKL at the end of a run, means over the training pairs."""
    reference, sequences = world()
    policy, objective = reference.clone().requires_grad_(), Objective([(1.0, make(name, beta=BETA, **knobs))])
    optimizer = torch.optim.Adam([policy], lr=0.02)
    sides = Sides(True, 2 * PAIRS, 2 * PAIRS * LENGTH, PAIRS, PAIRS * LENGTH)
    for _ in range(150):
        optimizer.zero_grad()
        (objective(scores_of(policy, reference, sequences), sides, {}, {})[0].sum() / PAIRS).backward()
        optimizer.step()
    chosen, rejected = scores_of(policy, reference, sequences).total("forward_kl").detach().split(PAIRS)
    return {"chosen": chosen.mean().item(), "rejected": rejected.mean().item()}


def test_the_second_form_ends_under_half_of_the_divergence_of_dpo():
    dpo, tdpo2 = trained("dpo"), trained("tdpo2", alpha=0.5)
    for side in ("chosen", "rejected"):
        assert tdpo2[side] < 0.5 * dpo[side]


def test_the_first_form_closes_the_gap_between_the_answers():
    dpo, tdpo1 = trained("dpo"), trained("tdpo1")
    assert dpo["rejected"] - dpo["chosen"] > 4 * abs(tdpo1["rejected"] - tdpo1["chosen"])
    assert tdpo1["chosen"] > 0.5 * dpo["chosen"]  # which it does not do by staying at home


def test_more_alpha_is_less_divergence():
    ends = [trained("tdpo2", alpha=alpha)["rejected"] for alpha in (0.25, 0.5, 1.0)]
    assert ends == sorted(ends, reverse=True)
