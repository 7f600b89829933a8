"""Pairs for the oracle, and the same numbers as a loss sees them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import Loss, Objective, Sides
from prefopt.scoring.scores import TokenScores
from tests.losses.views import Micro
from tests.oracle.float64 import Answer, Numbers, Pair

Rows = list[Pair]  # of Python floats


def uniform(rng: random.Random, tokens: int, low: float, high: float) -> list[float]:
    return [rng.uniform(low, high) for _ in range(tokens)]


def random_answer(rng: random.Random, tokens: int, *, weighted: bool = False) -> Answer:
    """Log-probabilities between -6 and 0 under the reference, and others not far from them under the policy."""
    reference = uniform(rng, tokens, -6.0, -1e-3)
    policy = [min(-1e-6, value + rng.gauss(0.0, 0.7)) for value in reference]
    kl = [(ours - theirs) ** 2 / 2 for ours, theirs in zip(policy, reference, strict=True)]
    weight = uniform(rng, tokens, 0.1, 2.0) if weighted else None
    turn = [place // 3 for place in range(tokens)]
    return Answer(policy, reference, weight, kl, turn, [(1.0, 0.25, 0.0, 1.0)[number % 4] for number in turn])


def random_rows(count: int, seed: int, *, longest: int = 12, weighted: bool = False) -> Rows:
    rng = random.Random(seed)

    def answer() -> Answer:
        return random_answer(rng, rng.randint(1, longest), weighted=weighted)

    return [Pair(answer(), answer(), random_columns(rng)) for _ in range(count)]


def random_columns(rng: random.Random) -> dict[str, float]:
    """Scores above 0, the chosen one's never the lower."""
    lost = rng.uniform(0.05, 2.0)
    won = lost + rng.uniform(0.0, 3.0)
    return {"preference": rng.random(), "score_chosen": won, "score_rejected": lost, "offset": rng.uniform(-2, 2)}


def with_ratio(ratio: float, tokens: int) -> Answer:
    """An answer with this log-ratio, spread evenly; the less likely of the two models gives it the whole of it."""
    policy = [-0.5 + min(0.0, ratio) / tokens] * tokens
    return Answer(policy, [value - ratio / tokens for value in policy])


def extreme_rows(largest: float = 1e4) -> Rows:
    """Every pair of log-ratios from -10,000 to 10,000 nats, over one token and over four."""
    rng = random.Random(3)
    ratios = [-largest, -300.0, -50.0, -1.0, 0.0, 1.0, 50.0, 300.0, largest]
    return [
        Pair(with_ratio(a, tokens), with_ratio(b, tokens), random_columns(rng))
        for a, b in product(ratios, repeat=2)
        for tokens in (1, 4)
        if max(abs(a), abs(b)) <= largest
    ]


def equal_rows() -> Rows:
    """Policy and reference agree, as on the first step, and scores are tied; some rows have two equal answers."""
    rng = random.Random(4)
    tie = {"preference": 0.5, "score_chosen": 1.5, "score_rejected": 1.5, "offset": 0.0}
    rows = []
    for tokens, same in product((1, 2, 7), (True, False)):
        chosen = uniform(rng, tokens, -4.0, -0.1)
        rejected = chosen if same else uniform(rng, tokens + 1, -4.0, -0.1)
        rows.append(Pair(Answer(chosen, chosen), Answer(rejected, rejected), tie))
    return rows


def one_token_rows() -> Rows:
    return random_rows(12, seed=5, longest=1)


def as_micro(rows: Rows, columns: Sequence[str], dtype: torch.dtype = torch.float64) -> Micro:
    """The rows as a micro-batch with these columns; `logp` takes a gradient."""
    targets = targets_of(rows, columns)
    answers = answers_of(rows) + targets
    lengths = [len(answer.policy) for answer in answers]
    sequence = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths))

    def flat(parts: list[Numbers]) -> Tensor:
        return torch.tensor([value for part in parts for value in part], dtype=dtype)

    weights = [answer.weight for answer in answers if answer.weight is not None]
    turns = [turn for answer in answers for turn in answer.turn or [0] * len(answer.policy)]
    segments = [answer.segment or [1.0] * len(answer.policy) for answer in answers]
    scores = TokenScores(
        len(answers),
        sequence,
        flat([answer.policy for answer in answers]).requires_grad_(),
        flat([answer.reference for answer in answers]),
        forward_kl=flat([answer.kl or [0.0] * len(answer.policy) for answer in answers]),
        token_weight=flat(weights) if weights else None,
        turn=torch.tensor(turns),
        segment=flat(segments),
    )
    size, count = 2 * len(rows), len(rows)
    sides = Sides(True, size, sum(lengths[:size]), count, sum(lengths[:count]), len(targets), sum(lengths[size:]))
    numbers = {
        name: torch.tensor([only(row.columns, columns)[name] for row in rows], dtype=dtype)
        for name in columns
        if name != "target"
    }
    return Micro(scores, sides, numbers)


def as_tensors(rows: Rows, columns: Sequence[str]) -> tuple[list[Pair], list[Tensor]]:
    """The rows in float64 tensors with these columns alone, and the policy's log-probabilities of every answer."""
    leaves: dict[tuple[str, int], Tensor] = {}

    def answer(given: Answer, side: str, index: int) -> Answer:
        leaf = leaves[side, index] = torch.tensor(given.policy, dtype=torch.float64, requires_grad=True)
        kl = None if given.kl is None else torch.tensor(given.kl, dtype=torch.float64)
        reference = torch.tensor(given.reference, dtype=torch.float64)
        return Answer(leaf, reference, given.weight, kl, given.turn, given.segment)

    targets = [answer(target, "target", i) for i, target in enumerate(targets_of(rows, columns))]
    pairs = [
        Pair(answer(row.chosen, "chosen", i), answer(row.rejected, "rejected", i), only(row.columns, columns), target)
        for i, (row, target) in enumerate(zip_longest(rows, targets))
    ]
    sides = ("chosen", "rejected", *(("target",) if targets else ()))
    return pairs, [leaves[side, i] for side in sides for i in range(len(rows))]


def targets_of(rows: Rows, columns: Sequence[str]) -> list[Answer]:
    """A target for each row where `target` is among the columns, else none: the rejected answer of the row before."""
    return [rows[index - 1].rejected for index in range(len(rows))] if "target" in columns else []


def only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The columns of these names; one half where there is none, as in a column that no formula here knows."""
    return {name: values.get(name, 0.5) for name in names if name != "target"}


def mismatched_rows(*, above: bool = True) -> Rows:
    """Other answers, for losses that take a mean over such; their mean log-ratio is above 0, or below."""
    return random_rows(5, seed=10 if above else 11)


def answers_of(rows: Rows) -> list[Answer]:
    return [row.chosen for row in rows] + [row.rejected for row in rows]


def loss_and_gradient(loss: Loss, micro: Micro, mismatched: Rows | None = None) -> tuple[Tensor, Tensor]:
    """Values of a loss and the gradient of their sum by every token's log-probability."""
    estimates = {}
    if loss.needs.mismatched:
        other = as_micro(mismatched_rows() if mismatched is None else mismatched, (), micro.scores.logp.dtype)
        parts = Objective([(1.0, loss)]).estimates(other.scores, other.sides, {}, mismatched=True)
        estimates = {name.removeprefix("0/"): total / count for name, (total, count) in parts.items()}
    values = loss(micro.view(loss.needs, estimates)).loss
    (gradient,) = torch.autograd.grad(values.sum(), micro.scores.logp)
    return values.detach(), gradient
