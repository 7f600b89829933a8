"""Random micro-batches for any loss: scores, columns and sides, laid out as collation lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import Completions, Loss, Objective, Pairs, Sides
from prefopt.losses.base import Needs
from prefopt.losses.views import build_view
from prefopt.scoring.scores import STATISTICS, TokenScores

# What a column looks like when plain uniform numbers in (0, 1) would not do; a new loss's columns are added here.
COLUMNS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "score_chosen": lambda rows, rng: 1.0 + torch.rand(rows, generator=rng, dtype=torch.float64),
    "score_rejected": lambda rows, rng: torch.rand(rows, generator=rng, dtype=torch.float64),
}


@dataclass
class Micro:
    """A micro-batch: scores of all completions (desirable first), its sides, and columns `[B]`."""

    scores: TokenScores
    sides: Sides
    columns: dict[str, Tensor]

    def view(self, needs: Needs, estimates: Mapping[str, Any] | None = None) -> Pairs | Completions:
        """The view that `needs` asks for."""
        facts = {name: value for name, value in self.sides._asdict().items() if name not in ("size", "tokens")}
        return build_view(needs, self.scores, columns=self.columns, estimates=estimates, **facts)

    @property
    def rows(self) -> int:
        return self.sides.desirable_size if self.sides.paired else self.sides.size


def random_micro(
    lengths: Sequence[int] = (3, 5, 1, 4, 2, 6, 3, 1),
    *,
    paired: bool = True,
    desirable: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    columns: Sequence[str] = (),
    weighted: bool = False,
) -> Micro:
    """Completions of these lengths with every statistic there is; the first half of them (or `desirable`) is chosen.

    With `target` among the columns each pair has one: the lengths of the chosen answers once more, in reverse.
    Turns are of two tokens; in the segment the first one weighs 1, the second 0, the third a half.
    """
    rng = torch.Generator().manual_seed(seed)
    size = len(lengths)
    desirable = size // 2 if desirable is None else desirable
    targets = list(reversed(lengths[:desirable])) if "target" in columns else []
    lengths = [*lengths, *targets]
    tokens = sum(lengths)

    def positive() -> Tensor:
        return torch.rand(tokens, generator=rng, dtype=torch.float64).mul(2).add(0.01).to(dtype)

    statistics = {name: -positive() if "logp" in name else positive() for name in STATISTICS}
    statistics["logp"].requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    turn = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(length) // 2 for length in lengths)])
    segment = torch.tensor([1.0, 0.0, 0.5], dtype=dtype)[turn % 3]
    weight = positive() if weighted else None
    scores = TokenScores(len(lengths), sequence, token_weight=weight, turn=turn, segment=segment, **statistics)
    rows = size // 2 if paired else size
    made = {
        name: COLUMNS.get(name, lambda n, g: torch.rand(n, generator=g, dtype=torch.float64))(rows, rng).to(dtype)
        for name in columns
        if name != "target"
    }
    sides = Sides(paired, size, sum(lengths[:size]), desirable, sum(lengths[:desirable]), len(targets), sum(targets))
    return Micro(scores, sides, made)


def micro_for(loss: Loss, lengths: Sequence[int] = (3, 5, 1, 4, 2, 6, 3, 1), **options: Any) -> Micro:
    """A paired micro-batch with every column that the loss may read."""
    return random_micro(lengths, columns=loss.needs.columns + loss.needs.optional_columns, **options)


def single_tokens(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    dtype: torch.dtype = torch.float64,
    columns: Mapping[str, Sequence[float]] | None = None,
) -> Micro:
    """Pairs of one-token answers with these log-ratios; the reference gives every answer -1 or less, as it must."""
    ratios = torch.tensor([*chosen, *rejected], dtype=torch.float64)
    logp = -1.0 - (-ratios).clamp(min=0)
    kl = torch.full_like(ratios, 0.5).to(dtype)
    scores = TokenScores(
        len(ratios),
        torch.arange(len(ratios)),
        logp.to(dtype).requires_grad_(),
        (logp - ratios).to(dtype),
        forward_kl=kl,
        reverse_kl=kl.clone(),
        entropy=kl.clone(),
        turn=torch.zeros(len(ratios), dtype=torch.int64),
    )
    given = {name: torch.tensor(values, dtype=dtype) for name, values in (columns or {}).items()}
    return Micro(scores, Sides(True, len(ratios), len(ratios), len(chosen), len(chosen)), given)


def run(loss: Loss, micro: Micro) -> Any:
    """The loss's output on a micro-batch, with its estimates taken over that micro-batch alone."""
    return loss(full_view(loss, micro))


def full_view(loss: Loss, micro: Micro) -> Pairs | Completions:
    """The view of a loss, estimates included; mismatched answers are others, the same ones each time."""
    objective = Objective([(1.0, loss)])
    other = random_micro(seed=99, dtype=micro.scores.logp.dtype)
    parts = objective.estimates(micro.scores, micro.sides, micro.columns)
    parts |= objective.estimates(other.scores, other.sides, other.columns, mismatched=True)
    quotients = {name.removeprefix("0/"): total / count for name, (total, count) in parts.items()}
    return micro.view(loss.needs, quotients)


def take_rows(micro: Micro, rows: Sequence[int]) -> Micro:
    """The given pairs of a paired micro-batch, in this order, as a micro-batch of their own."""
    pairs = micro.rows
    parts = 3 if micro.sides.target_size else 2
    order = [row + part * pairs for part in range(parts) for row in rows]
    picked = [torch.nonzero(micro.scores.sequence == completion).flatten() for completion in order]
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *picked])
    lengths = [len(index) for index in picked]
    values = {name: value[tokens] for name, value in micro.scores.statistics.items()}
    weight = micro.scores.token_weight
    sequence = torch.repeat_interleave(torch.arange(len(order)), torch.tensor(lengths, dtype=torch.int64))
    scores = TokenScores(len(order), sequence, token_weight=None if weight is None else weight[tokens], **values)
    count = len(rows)
    sides = Sides(True, 2 * count, sum(lengths[: 2 * count]), count, sum(lengths[:count]), (parts - 2) * count,
                  sum(lengths[2 * count :]))  # fmt: skip
    return Micro(scores, sides, {name: value[list(rows)] for name, value in micro.columns.items()})


def per_row(loss: Loss, micro: Micro, values: Tensor) -> list[Tensor]:
    """Values of a loss sorted by row of a paired micro-batch: all that belong to row 0, to row 1, and so on."""
    if loss.unit == "pair":
        return list(values.split(1))
    owner = micro.scores.sequence[: len(values)] if loss.unit == "token" else torch.arange(len(values))
    return [values[owner % micro.rows == row] for row in range(micro.rows)]
