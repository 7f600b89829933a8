"""Views: the scores of a micro-batch as a loss wants to see them, with what it declared and nothing else.

Completions come desirable first. On paired data `[0:B]` are the chosen answers and `[B:2B]` the rejected ones, row by
row, and a column holds one number for each pair; where the rows have a target, `[2B:3B]` are the targets. On unpaired
data a column holds one number for each completion.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from prefopt.errors import DataError
from prefopt.losses.base import TARGET, Needs
from prefopt.scoring.scores import OF_TURNS, TokenScores

Value = TypeVar("Value")


class UndeclaredColumn(LookupError):
    """A loss read a column that its `needs` do not declare, so no data was ever checked for it."""


class Columns(Mapping[str, Value]):
    """Columns by name. An absent optional column is a `KeyError`, so `get` gives None; an undeclared one raises."""

    def __init__(self, values: Mapping[str, Value], declared: Collection[str]) -> None:
        self._values = values
        self._declared = frozenset(declared)

    def __getitem__(self, name: str) -> Value:
        if name not in self._declared:
            raise UndeclaredColumn(f'column `{name}` was read but not declared: say Needs(columns=("{name}",))')
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, eq=False)
class Pairs:
    """`B` pairs: `chosen` and `rejected` hold `B` completions each, in the same order; columns are `[B]`.

    `answers` are columns that hold answers, `B` completions each; there is one such column, `target`.
    """

    chosen: TokenScores
    rejected: TokenScores
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    estimates: Mapping[str, Tensor | float] = field(default_factory=dict)
    answers: Mapping[str, TokenScores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chosen.size != self.rejected.size:
            raise ValueError(f"{self.chosen.size} chosen completions against {self.rejected.size} rejected ones")
        for name, scores in self.answers.items():
            if scores.size != self.chosen.size:
                raise ValueError(f"{scores.size} completions in `{name}` for {self.chosen.size} pairs")

    @property
    def target(self) -> TokenScores | None:
        """Scores of the rows' targets; None where the data has no such column, `UndeclaredColumn` as for any."""
        return self.answers.get(TARGET)

    def units(self, unit: str) -> int:
        """How many values a loss of this unit gives for this view."""
        return {"pair": self.chosen.size}[unit]


@dataclass(frozen=True, eq=False)
class Completions:
    """Single answers: `scores` of `size` completions, `desirable` `[size]` bool (None: unknown), columns `[size]`."""

    scores: TokenScores
    desirable: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    estimates: Mapping[str, Tensor | float] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """`desirable`, for a loss that cannot do without. Raises `ValueError` when it is unknown."""
        if self.desirable is None:
            raise ValueError("this loss needs to know which answers are desirable: give `desirable`")
        return self.desirable

    def units(self, unit: str) -> int:
        """How many values a loss of this unit gives for this view."""
        return {"completion": self.scores.size, "token": self.scores.sequence.shape[0]}[unit]


def check_rows(needs: Needs, *, paired: bool, columns: Collection[str], name: str = "this loss") -> None:
    """`DataError` when data of this kind with these columns cannot feed the loss; asked before a model is loaded."""
    if needs.view == "pairs" and not paired:
        raise DataError(
            f"`{name}` compares two answers to one prompt, but the data has single answers. "
            "Give pairs (prompt, chosen, rejected), or choose a loss that reads single answers, such as kto or sft."
        )
    for column in needs.columns:
        if column not in columns:
            raise DataError(f"`{name}` needs a column `{column}`, a number for each row; the data has no such column.")


def build_view(
    needs: Needs,
    scores: TokenScores,
    *,
    paired: bool,
    desirable_size: int,
    desirable_tokens: int,
    target_size: int = 0,
    target_tokens: int = 0,
    columns: Mapping[str, Tensor],
    estimates: Mapping[str, Tensor | float] | None = None,
    name: str = "this loss",
) -> Pairs | Completions:
    """The view that `needs` asks for.

    The first `desirable_size` completions of `scores`, which own the first `desirable_tokens` tokens, are the chosen or
    desirable ones, the last `target_size` the targets. `columns` are per row. No gradient reaches the reference or the
    columns. `DataError` when the data cannot feed the loss, `ValueError` when the pieces do not fit each other.
    """
    declared = _declared(needs, scores)
    size, tokens = scores.size - target_size, scores.sequence.shape[0] - target_tokens
    answers = {}
    if target_size:
        answers[TARGET] = declared.slice(slice(size, scores.size), slice(tokens, tokens + target_tokens))
    check_rows(needs, paired=paired, columns={*columns, *answers}, name=name)
    desirable = declared.slice(slice(0, desirable_size), slice(0, desirable_tokens))
    wanted = needs.columns + needs.optional_columns
    laid_out = {
        column: per_unit(values.detach(), needs, paired=paired, desirable_size=desirable_size)
        for column, values in columns.items()
        if column in wanted
    }
    given = dict(estimates or {})
    if needs.view == "pairs":
        rejected = declared.slice(slice(desirable_size, size), slice(desirable_tokens, tokens))
        _check_lengths(laid_out, desirable_size)
        third = Columns({name: answers[name] for name in answers if name in wanted}, wanted)
        return Pairs(desirable, rejected, Columns(laid_out, wanted), given, third)
    held = desirable if needs.completions == "desirable" else declared.slice(slice(0, size), slice(0, tokens))
    _check_lengths(laid_out, held.size)
    flags = torch.arange(held.size, device=scores.sequence.device) < desirable_size
    return Completions(held, flags, Columns(laid_out, wanted), given)


def per_unit(values: Tensor, needs: Needs, *, paired: bool, desirable_size: int) -> Tensor:
    """Numbers per row, `[B]`, laid out as the pairs or the completions of the view."""
    if needs.view == "pairs":
        return values
    if needs.completions == "desirable":
        return values[:desirable_size]
    return torch.cat([values, values]) if paired else values


def _declared(needs: Needs, scores: TokenScores) -> TokenScores:
    reference = () if needs.reference == "none" else ("ref_logp",)
    kept = scores.only(needs.statistics + reference + (OF_TURNS if needs.turns else ()))
    values = {name: value.detach() if name == "ref_logp" else value for name, value in kept.statistics.items()}
    return TokenScores(kept.size, kept.sequence, token_weight=kept.token_weight, **values)


def _check_lengths(columns: Mapping[str, Tensor], size: int) -> None:
    for name, values in columns.items():
        if values.shape != (size,):
            raise ValueError(f"column `{name}` has shape {tuple(values.shape)}, the view holds {size} rows")
