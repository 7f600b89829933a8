"""Formulas shared by several losses: unreduced, differentiable, and stable wherever their value is representable.

Letters as in the papers: `a`, `b` log-ratios of the chosen and the rejected answer, `h = a - b` the margin in nats,
`S` the logistic function, `L(z) = -log S(z)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses.views import Completions, Pairs
from prefopt.scoring.scores import TokenScores

GAP_FLOOR = 1e-3
"""The smallest gap between two scores whose logarithm is taken: a tie would be an offset of minus infinity."""

TURNS_LOGGED = 3
"""Turns that have a metric of their own: names must be the same in every batch, and the first turns matter most."""


def logistic(z: Tensor) -> Tensor:
    """L(z) = -log S(z) = log(1 + e^-z). softplus(-z) would turn into the straight line -z from -z = 20 on."""
    return -F.logsigmoid(z)


def soft_logistic(z: Tensor, probability: Tensor | float) -> Tensor:
    """p L(z) + (1 - p) L(-z): the cross-entropy of S(z) against a label that is true with probability p."""
    return probability * logistic(z) + (1 - probability) * logistic(-z)


def tamed_exp(x: Tensor) -> Tensor:
    """e^x, going on as its own tangent from the point where 10,000 nats more would overflow the number format.

    Value and slope have no jump there, so a gradient keeps its direction. In float32 the point is x = 72.
    """
    exact = x.clamp(max=math.log(torch.finfo(x.dtype).max) - 16)
    return exact.exp() * (1 + (x - exact))


def divergence_slope(log_ratio: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    """f'(u) at log u = `log_ratio`, for the f of a divergence; 0 at u = 1. `alpha` is read with "alpha" alone."""
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    power = 1.0 if alpha is None else alpha  # of the alpha-divergences the forward KL is the one with alpha 1
    return (1 - tamed_exp(-power * log_ratio)) / power


def mean_log_ratio(scores: TokenScores) -> Tensor:
    """log pi(y|x) - log ref(y|x) of a completion over the sum of its token weights, `[size]`; 0 without tokens."""
    difference = scores.logp - scores.ref_logp
    return TokenScores(scores.size, scores.sequence, difference, token_weight=scores.token_weight).mean("logp")


def token_nll(scores: TokenScores) -> Tensor:
    """-log pi of every scored token, `[M]`, times the token's weight where there is one."""
    return -scores.logp if scores.token_weight is None else -scores.logp * scores.token_weight


def in_segment(scores: TokenScores) -> TokenScores:
    """The scores with each turn's weight in the row's segment, 0 outside it; as they are where rows have no segment."""
    return scores.weighted(scores.segment) if "segment" in scores.statistics else scores


def discounted_turns(scores: TokenScores, gamma: float, form: str) -> TokenScores:
    """The scores with DMPO's weight of each token's turn t among the T turns of its completion.

    `phi` is (1 - gamma^(T - t)) / (1 - gamma^T), `occupancy` gamma^t times that; (T - t) / T at gamma 1 for both.
    """
    turn = scores.turn.to(scores.logp)
    turns = _per_completion(scores, _begins_turn(scores)).to(turn)[scores.sequence]
    if gamma == 1:
        return scores.weighted((turns - turn) / turns)
    rate = math.log(gamma) if gamma else -math.inf  # 1 - gamma^n keeps its digits near gamma 1
    weight = torch.expm1((turns - turn) * rate) / torch.expm1(turns * rate)
    return scores.weighted(weight * gamma**turn if form == "occupancy" else weight)


@torch.no_grad()
def score_offset(columns: Mapping[str, Tensor], alpha: float, f: str, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """ODPO's offset of each pair, `[B]`, in the precision of `z` and without gradient, and what to log of it.

    It is the column `offset` as it stands, or else alpha times the gap of `score_chosen` and `score_rejected`:
    `identity` s_w - s_l, `log` ln(s_w - s_l), `log_ratio` ln(s_w / s_l). Below `log` the gap is at least `GAP_FLOOR`.
    """
    if "offset" in columns:
        offset = columns["offset"].detach().to(z)
        return offset, {"offset": offset}
    chosen, rejected = columns["score_chosen"].to(z), columns["score_rejected"].to(z)
    gap = chosen - rejected
    noted = {"score_ties": (gap == 0).to(gap)}
    if f == "log_ratio":
        size = chosen.log() - rejected.log()
    elif f == "log":
        size = gap.clamp(min=GAP_FLOOR).log()
        noted["offset_floored"] = (gap < GAP_FLOOR).to(gap)
    else:
        size = gap
    offset = alpha * size if alpha > 0 else torch.zeros_like(size)  # 0 times the log of a negative score is not 0
    return offset, {"offset": offset, **noted}


def score_problem(columns: Mapping[str, float], alpha: float, f: str) -> str:
    """Why a row has no such offset; empty when it has one."""
    if "offset" in columns:
        unread = (alpha, f) != (1.0, "log")
        return "the column `offset` is taken as it stands, so alpha and f must keep their defaults" if unread else ""
    if not {"score_chosen", "score_rejected"} <= set(columns):
        return "`odpo` reads the scores of both answers: give each row `score_chosen` and `score_rejected`, or `offset`"
    chosen, rejected = columns["score_chosen"], columns["score_rejected"]
    scores = f"`score_chosen` is {chosen} and `score_rejected` {rejected}"
    if alpha and f == "log_ratio" and min(chosen, rejected) <= 0:
        return f"{scores}: the logarithm of their ratio wants both above 0"
    if alpha and chosen < rejected:
        return f"{scores}: they contradict the label. Swap the two answers, leave the row out, or write alpha: 0"
    return ""


def preference_problem(columns: Mapping[str, float]) -> str:
    """Why the column `preference` is no probability; empty when it is one, or absent."""
    probability = columns.get("preference", 1.0)
    return "" if 0 <= probability <= 1 else f"`preference` is {probability}: a probability in [0, 1] is wanted"


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


@torch.no_grad()
def divergence_metrics(view: Pairs) -> dict[str, Tensor]:
    """What pair losses with a forward KL log of it, `[B]` each, in nats.

    `seqkl/*` are sums over the tokens of an answer, `seqkl/margin` rejected less chosen; `kl_per_token/*` their means.
    """
    chosen, rejected = view.chosen.total("forward_kl"), view.rejected.total("forward_kl")
    return {
        "seqkl/chosen": chosen,
        "seqkl/rejected": rejected,
        "seqkl/margin": rejected - chosen,
        "kl_per_token/chosen": view.chosen.mean("forward_kl"),
        "kl_per_token/rejected": view.rejected.mean("forward_kl"),
    }


@torch.no_grad()
def turn_metrics(chosen: TokenScores, rejected: TokenScores) -> dict[str, Tensor]:
    """What losses of several turns log of the turns that count, those whose weight is not 0.

    `turn_margins/<t>` is the difference of the two sides' log-ratios in turn t, counted from 0, in nats, a value for
    each pair that has the turn on both sides; `turn_margins/later` that of all turns from `TURNS_LOGGED` on together.
    `turns/*` `[B]` are numbers of turns, `turn_tokens/*` `[B]` those of their tokens.
    """
    metrics = {}
    for name, which in (*((str(turn), (turn, turn)) for turn in range(TURNS_LOGGED)), ("later", (TURNS_LOGGED, None))):
        (a, in_chosen), (b, in_rejected) = _of_turns(chosen, *which), _of_turns(rejected, *which)
        metrics[f"turn_margins/{name}"] = (a - b)[in_chosen & in_rejected]
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        counted = _counted(scores)
        metrics[f"turns/{side}"] = _per_completion(scores, counted & _begins_turn(scores)).to(scores.logp)
        metrics[f"turn_tokens/{side}"] = _per_completion(scores, counted).to(scores.logp)
    return metrics


def _of_turns(scores: TokenScores, first: int, last: int | None) -> tuple[Tensor, Tensor]:
    """Log-ratio of the turns from `first` to `last`, and whether any of them counts; both `[size]`."""
    among = (scores.turn >= first) if last is None else (scores.turn >= first) & (scores.turn <= last)
    return scores.weighted(among.to(scores.logp)).log_ratio(), _per_completion(scores, among & _counted(scores)) > 0


def _counted(scores: TokenScores) -> Tensor:
    return torch.ones_like(scores.turn, dtype=torch.bool) if scores.token_weight is None else scores.token_weight != 0


def _begins_turn(scores: TokenScores) -> Tensor:
    """Whether a token is the first of its turn, `[M]`."""
    begins = torch.ones_like(scores.turn, dtype=torch.bool)
    begins[1:] = (scores.turn[1:] != scores.turn[:-1]) | (scores.sequence[1:] != scores.sequence[:-1])
    return begins


def _per_completion(scores: TokenScores, flags: Tensor) -> Tensor:
    """How many flags of each completion are set: `[size]` int64."""
    return scores.sequence.new_zeros(scores.size).index_add(0, scores.sequence, flags.to(scores.sequence))


@torch.no_grad()
def answer_metrics(view: Completions, reward: Tensor) -> dict[str, Tensor]:
    """What every loss of single answers logs, for desirable and other answers apart; an absent class has no values.

    `rewards/*`, `logps/*` and `logratios/*` as in `pair_metrics`, each over the answers of its class.
    """
    metrics = {}
    for side, members in (("chosen", view.labels), ("rejected", ~view.labels)):
        metrics[f"rewards/{side}"] = reward[members]
        metrics[f"logps/{side}"] = view.scores.total("logp")[members]
        metrics[f"logratios/{side}"] = view.scores.log_ratio()[members]
    return metrics


def balance_notes(good: int, bad: int, good_weight: float, bad_weight: float) -> list[str]:
    """The classes of single answers with the weight each has, and a remedy where good ones weigh too little or much.

    KTO's authors keep the weight of the good answers together between 1 and 1.5 times that of the bad ones.
    """
    lines = [f"{good:,} good answers at weight {good_weight:g}, {bad:,} bad ones at weight {bad_weight:g}"]
    if not good or not bad:
        return [*lines, "every answer is of one class: nothing holds the policy back from moving all answers one way"]
    share = good * good_weight / (bad * bad_weight) if bad_weight else math.inf
    if not 1 <= share <= 1.5:
        low, high = bad * bad_weight / good, 1.5 * bad * bad_weight / good
        lines.append(f"the good ones weigh {share:.2f} times the bad ones, and 1 to 1.5 is advised: set "
                     f"desirable_weight between {low:.3g} and {high:.3g}")  # fmt: skip
    return lines
