"""Losses once more, written from the papers and not from the package, one pair at a time and in plain arithmetic.

A loss that is not here has its formula in its own test file, in the same arithmetic: `FACTS.formula`.

The numbers may be float64 tensors of no dimension, so that autograd gives the gradient, or mpmath's numbers of any
precision. Letters: `lp`, `lr` log-probabilities of an answer under policy and reference, summed over its tokens; `n`
its number of tokens; `a`, `b` the log-ratios lp - lr of the chosen and the rejected answer; `h = a - b`; `S` the
logistic function, `L(z) = -log S(z)`. Defaults are those that papers, or else their authors' code, call usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mpmath
import torch
from torch import Tensor

from prefopt.losses import get
from tests.losses.facts import facts_of

Number = Any  # a float64 tensor of no dimension, or an mpmath number
Numbers = Sequence[Number] | Tensor


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of the scored tokens of one answer; `weight` scales a token in every sum and in the length.

    `kl` is KL(reference || policy) of the whole next-token distributions at each of them, 0 where it is not given.
    `turn` is the number of each token's turn, 0 where it is not given, and `segment` the weight of that turn.
    """

    policy: Numbers
    reference: Numbers
    weight: Numbers | None = None
    kl: Numbers | None = None
    turn: Sequence[int] | None = None
    segment: Sequence[float] | None = None

    @property
    def lp(self) -> Number:
        return self._sum(self.policy)

    @property
    def lr(self) -> Number:
        return self._sum(self.reference)

    @property
    def seqkl(self) -> Number:
        return self.lp * 0 if self.kl is None else self._sum(self.kl)

    @property
    def n(self) -> Number:
        """Number of scored tokens, at least 1."""
        return max(len(self.policy), 1) if self.weight is None else sum(self.weight)

    @property
    def ratio(self) -> Number:
        return self.lp - self.lr

    def ratio_of_turns(self, weight: Callable[[int], Number]) -> Number:
        """The log-ratios of the turns, each times its weight, in order of the turns."""
        turns = [0] * len(self.policy) if self.turn is None else list(self.turn)
        total = self.ratio * 0
        for turn in sorted(set(turns)):
            at = [place for place, number in enumerate(turns) if number == turn]
            masses = [1 if self.weight is None else self.weight[place] for place in at]
            total = total + weight(turn) * sum(
                mass * (self.policy[place] - self.reference[place]) for mass, place in zip(masses, at, strict=True)
            )
        return total

    def _sum(self, values: Numbers) -> Number:
        weights = [1] * len(values) if self.weight is None else self.weight
        return sum(weight * value for weight, value in zip(weights, values, strict=True))


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `columns` are the row's numbers: scores, offset, preference."""

    chosen: Answer
    rejected: Answer
    columns: Mapping[str, Number] = field(default_factory=dict)
    target: Answer | None = None

    @property
    def h(self) -> Number:
        return self.chosen.ratio - self.rejected.ratio


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def L(z: Number) -> Number:
    """log(1 + e^-z)."""
    return torch.logaddexp(torch.zeros_like(z), -z) if isinstance(z, Tensor) else mpmath.log1p(mpmath.exp(-z))


def S(z: Number) -> Number:
    """1 / (1 + e^-z)."""
    return torch.sigmoid(z) if isinstance(z, Tensor) else 1 / (1 + mpmath.exp(-z))


def positive(x: Number) -> Number:
    """max(0, x); its derivative at 0 is 0."""
    return torch.relu(x) if isinstance(x, Tensor) else max(mpmath.mpf(0), x)


def expm1(x: Number) -> Number:
    """e^x - 1."""
    return torch.expm1(x) if isinstance(x, Tensor) else mpmath.expm1(x)


def log(x: Number) -> Number:
    return mpmath.log(x) if isinstance(x, mpmath.mpf) else math.log(x)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def dpo(pair: Pair, beta: float = 0.1) -> Number:
    """arXiv 2305.18290, eq. 7; `preference` is the probability that the label is right."""
    p = pair.columns.get("preference", 1)
    z = beta * pair.h
    return p * L(z) + (1 - p) * L(-z)


def cdpo(pair: Pair, beta: float = 0.1, label_smoothing: float = 0.1) -> Number:
    """E. Mitchell's note on DPO with noisy labels (2023)."""
    z, e = beta * pair.h, label_smoothing
    return (1 - e) * L(z) + e * L(-z)


def rdpo(pair: Pair, beta: float = 0.1, label_smoothing: float = 0.1) -> Number:
    """arXiv 2403.00409."""
    z, e = beta * pair.h, label_smoothing
    return ((1 - e) * L(z) - e * L(-z)) / (1 - 2 * e)


def ipo(pair: Pair, beta: float = 0.1, length: str = "mean") -> Number:
    """arXiv 2310.12036, eq. 17; `mean` as its authors used it; a soft label is the mean over flips of the label."""
    p = pair.columns.get("preference", 1)
    chosen, rejected = (pair.chosen.n, pair.rejected.n) if length == "mean" else (1, 1)
    h = pair.chosen.ratio / chosen - pair.rejected.ratio / rejected
    target = 1 / (2 * beta)
    return p * (h - target) ** 2 + (1 - p) * (-h - target) ** 2


def hinge(pair: Pair, beta: float = 0.05) -> Number:
    """The normalised hinge of RSO, arXiv 2309.06657."""
    return positive(1 - beta * pair.h)


def slic(pair: Pair, delta: float = 1.0, target_weight: float = 0.1, target_length: str = "sum") -> Number:
    """SLiC-HF, arXiv 2305.10425, eq. 4: no reference policy; the target is the chosen answer unless given."""
    target = pair.chosen if pair.target is None else pair.target
    likelihood = target.lp if target_length == "sum" else target.lp / target.n
    return positive(delta - pair.chosen.lp + pair.rejected.lp) - target_weight * likelihood


def dpop(pair: Pair, beta: float = 0.1, penalty: float = 5.0) -> Number:
    """DPO-Positive, arXiv 2402.13228: the penalty stands inside the logistic function."""
    return L(beta * (pair.h - penalty * positive(-pair.chosen.ratio)))


def simpo(pair: Pair, beta: float = 2.0, gamma_beta_ratio: float | None = None, gamma: float | None = None) -> Number:
    """arXiv 2405.14734: means of log-probabilities, no reference; gamma, or gamma / beta, which is 0.5 if neither."""
    if gamma is None:
        gamma = beta * (0.5 if gamma_beta_ratio is None else gamma_beta_ratio)
    margin = pair.chosen.lp / pair.chosen.n - pair.rejected.lp / pair.rejected.n
    return L(beta * margin - gamma)


def odpo(pair: Pair, beta: float = 0.1, alpha: float = 1.0, f: str = "log") -> Number:
    """arXiv 2402.10571: DPO with an offset, alpha f(scores), which is data; below the log the gap is 1e-3 or more."""
    return L(beta * pair.h - offset(pair.columns, alpha, f))


def offset(columns: Mapping[str, Number], alpha: float, f: str) -> Number:
    """alpha f(score_chosen, score_rejected), or the column `offset` as it stands."""
    if "offset" in columns:
        return columns["offset"]
    if alpha == 0:
        return 0
    won, lost = columns["score_chosen"], columns["score_rejected"]
    forms: dict[str, Callable[[], Number]] = {
        "log": lambda: log(max(won - lost, 1e-3)),
        "identity": lambda: won - lost,
        "log_ratio": lambda: log(won / lost),
    }
    return alpha * forms[f]()


def fdpo(pair: Pair, divergence: str = "js", beta: float = 0.1, alpha: float = 0.5) -> Number:
    """arXiv 2309.16240: f'(pi / ref) in the place of the log-ratio. A constant in f' cancels and is left out."""
    return L(beta * (slope(pair.chosen.ratio, divergence, alpha) - slope(pair.rejected.ratio, divergence, alpha)))


def slope(ratio: Number, divergence: str, alpha: float) -> Number:
    """f'(u), less a constant, at log u = `ratio`."""
    forms: dict[str, Callable[[], Number]] = {
        "reverse_kl": lambda: ratio,
        "forward_kl": lambda: -expm1(-ratio),
        "js": lambda: -L(ratio),
        "alpha": lambda: -expm1(-alpha * ratio) / alpha,
    }
    return forms[divergence]()


def tdpo1(pair: Pair, beta: float = 0.1) -> Number:
    """arXiv 2404.11999, eq. 15: sums over tokens first, one logistic function for a pair."""
    return L(beta * (pair.h - (pair.rejected.seqkl - pair.chosen.seqkl)))


def tdpo2(pair: Pair, beta: float = 0.1, alpha: float = 0.5) -> Number:
    """arXiv 2404.11999, eq. 17: the chosen answer's divergence keeps its value and loses its gradient."""
    kept = pair.chosen.seqkl.detach() if isinstance(pair.chosen.seqkl, Tensor) else pair.chosen.seqkl
    return L(beta * (pair.h - alpha * (pair.rejected.seqkl - kept)))


# ---- single answers -------------------------------------------------------------------------------------------------


def sft(answer: Answer) -> list[Number]:
    """-log pi of every token of an answer that was wanted."""
    weights = [1] * len(answer.policy) if answer.weight is None else answer.weight
    return [-weight * value for weight, value in zip(weights, answer.policy, strict=True)]


def kto(
    answers: Sequence[Answer],
    desirable: Sequence[bool],
    mismatched: Sequence[Answer],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z0: str = "estimate",
) -> list[Number]:
    """arXiv 2402.01306, eq. 8: one value for each answer of a step; `mismatched` are answers to other rows' prompts."""
    point = reference_point(mismatched) if z0 == "estimate" else 0
    values = []
    for answer, wanted in zip(answers, desirable, strict=True):
        gain = beta * (answer.ratio - point)
        values.append(desirable_weight * S(-gain) if wanted else undesirable_weight * S(gain))
    return values


def reference_point(mismatched: Sequence[Answer]) -> Number:
    """z0: the mean log-ratio of all mismatched answers of the step, clamped at 0 after that, without gradient."""
    point = positive(sum(answer.ratio for answer in mismatched) / len(mismatched))
    return point.detach() if isinstance(point, Tensor) else point


PAIR_LOSSES: dict[str, Callable[..., Number]] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "rdpo": rdpo,
    "ipo": ipo,
    "hinge": hinge,
    "slic": slic,
    "dpop": dpop,
    "simpo": simpo,
    "odpo": odpo,
    "fdpo": fdpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
}


FORMULAS: dict[str, Callable[..., Any]] = {**PAIR_LOSSES, "sft": sft, "kto": kto}


def formula(name: str) -> Callable[..., Any]:
    """The formula of a loss: this file's, or that of the loss's own test file."""
    own = FORMULAS.get(name) or facts_of(name).formula
    assert own is not None, f"`{name}` has no formula"
    return own


def values(name: str, pairs: Sequence[Pair], mismatched: Sequence[Answer] = (), **knobs: Any) -> list[Number]:
    """A loss on paired rows: a value for each pair, each token of the chosen, or each answer, chosen ones first."""
    if name == "sft":
        return [value for pair in pairs for value in sft(pair.chosen)]
    if name == "kto":
        answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return kto(answers, [index < len(pairs) for index in range(len(answers))], mismatched, **knobs)
    if get(name).needs.view == "pairs":
        return [formula(name)(pair, **knobs) for pair in pairs]
    sides = [(pair.chosen, True) for pair in pairs]
    sides += [(pair.rejected, False) for pair in pairs if get(name).needs.completions == "all"]
    return [value for answer, wanted in sides for value in formula(name)(answer, wanted, **knobs)]


# ---- what is logged --------------------------------------------------------------------------------------------------


def reward(name: str, answer: Answer, beta: float | None = None, **knobs: Any) -> Number:
    """The reward that a loss stands for: beta times the log-ratio, unless the loss has another."""
    if name not in FORMULAS and (own := facts_of(name).reward):
        return own(answer, **knobs) if beta is None else own(answer, beta=beta, **knobs)
    if name == "slic":
        return answer.lp
    if name == "simpo":
        return beta * answer.lp / answer.n
    if name in ("tdpo1", "tdpo2"):  # without alpha, as its authors log it
        return beta * (answer.ratio + answer.seqkl)
    if name == "fdpo":
        unlike, alpha = knobs.get("divergence", "js"), knobs.get("alpha", 0.5)
        return beta * (slope(answer.ratio, unlike, alpha) - slope(answer.ratio * 0, unlike, alpha))
    assert beta is not None, f"tests/losses/test_{name}.py: no beta, so its FACTS must have the `reward` that it logs"
    return beta * answer.ratio
