"""The objective of a run: one loss, or a weighted mixture, from scores to the number that is differentiated."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from prefopt.errors import RecipeError
from prefopt.losses.base import Loss, LossOutput, Reference
from prefopt.losses.registry import make
from prefopt.losses.views import Completions, Pairs, build_view, check_rows, per_unit
from prefopt.scoring.scores import TokenScores


class Sides(NamedTuple):
    """What is known of a micro-batch before it is scored: completions and scored tokens, and the desirable of each.

    Targets are counted apart: they are the last completions, after the `size` others.
    """

    paired: bool
    size: int
    tokens: int
    desirable_size: int
    desirable_tokens: int
    target_size: int = 0
    target_tokens: int = 0


def sides_of(batch: Mapping[str, Any]) -> Sides:
    """The `Sides` of a collated batch."""
    targets, target_tokens = batch["target_size"], batch["target_tokens"]
    return Sides(
        paired=batch["paired"],
        size=batch["size"] - targets,
        tokens=len(batch["sequence"]) - target_tokens,
        desirable_size=batch["desirable_size"],
        desirable_tokens=batch["desirable_tokens"],
        target_size=targets,
        target_tokens=target_tokens,
    )


class Objective:
    """A weighted sum of losses, each divided by the number of its own units over the whole step.

    `terms` are (weight, loss). `RecipeError` when a weight is negative or not finite, when all are 0, and when one
    loss stands there twice with the same knobs. What the system must compute for all terms together:

    `reference`: the most any term asks for. `statistics`, `columns`, `optional_columns`: all names any term declares.
    `paired_required`: some term compares two answers. `all_completions`: some term reads rejected or undesirable
    answers; otherwise only the desirable ones need a forward. `has_estimates`: some term asks for numbers over the
    whole step. `mismatched`: some term asks for them on mismatched answers, so pairs are read as single answers.
    `turns`: some term reads the assistant's turns.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        _check_terms(terms)
        self.terms = tuple(terms)
        self.weights = tuple(weight for weight, _ in terms)
        self.losses = tuple(loss for _, loss in terms)
        self.labels = _labels(self.losses)
        needs = [loss.needs for loss in self.losses]
        self.reference: Reference = max((need.reference for need in needs), key=get_args(Reference).index)
        self.statistics = _unique(name for need in needs for name in need.statistics)
        self.columns = _unique(column for need in needs for column in need.columns)
        optional = _unique(column for need in needs for column in need.optional_columns)
        self.optional_columns = tuple(column for column in optional if column not in self.columns)
        self.paired_required = any(need.view == "pairs" for need in needs)
        self.all_completions = any(need.completions == "all" for need in needs)
        self.mismatched = any(need.mismatched for need in needs)
        self.turns = any(need.turns for need in needs)
        self.plain_estimates = any(_asks_plainly(loss) for loss in self.losses)
        self.has_estimates = self.mismatched or self.plain_estimates
        if self.mismatched and self.paired_required:
            raise RecipeError(
                "loss: one term reads single answers with mismatched ones, another pairs; train them apart"
            )

    @classmethod
    def of(
        cls, loss: str | Loss | Objective | Sequence[str | Loss], weights: Sequence[float] | None = None
    ) -> Objective:
        """An objective from a name, a loss, or a list of these with a weight each (1 when there are no `weights`)."""
        if isinstance(loss, Objective):
            if weights is not None:
                raise RecipeError("loss_weights: an Objective brings its own weights; give them there")
            return loss
        parts = [loss] if isinstance(loss, (str, Loss)) else list(loss)
        if weights is not None and len(weights) != len(parts):
            raise RecipeError(f"loss_weights: {len(weights)} weights for {len(parts)} losses; give one for each")
        made = [make(part) if isinstance(part, str) else part for part in parts]
        return cls(list(zip(weights or [1.0] * len(made), made, strict=True)))

    def check_rows(self, *, paired: bool, columns: Collection[str]) -> None:
        """`DataError` when data of this kind with these columns cannot feed every term."""
        for loss in self.losses:
            check_rows(loss.needs, paired=paired, columns=columns, name=loss.name)

    def row_problem(self, columns: Mapping[str, float]) -> str:
        """Why one row's columns cannot be trained on, from the first term that minds; empty when none does."""
        return next((problem for loss in self.losses if (problem := loss.row_problem(columns))), "")

    def counts(self, sides: Sides) -> list[int]:
        """Units of each term in a micro-batch; known before its forward."""
        return [_count(loss, sides) for loss in self.losses]

    @torch.no_grad()
    def estimates(
        self, scores: TokenScores, sides: Sides, columns: Mapping[str, Tensor], *, mismatched: bool = False
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """`{"<term>/<name>": (sum, count)}` of a micro-batch; `__call__` takes the step's quotients by these keys.

        Of the terms that ask about the rows themselves or, `mismatched`, of those that ask about mismatched answers.
        """
        found = {}
        for index, loss in enumerate(self.losses):
            if not (loss.needs.mismatched if mismatched else _asks_plainly(loss)):
                continue
            view = view_of(loss, scores, sides, columns, {})
            found.update({f"{index}/{name}": parts for name, parts in loss.estimates(view).items()})
        return found

    def __call__(
        self,
        scores: TokenScores,
        sides: Sides,
        columns: Mapping[str, Tensor],
        estimates: Mapping[str, Tensor | float] | None = None,
        row_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of each term's values, `[terms]`, and unreduced metrics `{name: [n]}`; `combine` makes the loss.

        `columns` and `row_weight` are `[B]`, one number for each row. A weight multiplies the values of its row and
        leaves the counts alone. Of two metrics with one name the first term's is kept; with several terms each one's
        own values are logged too, as `loss/<name>`. A sum over no units is 0 and still reaches `logp`.
        """
        sums: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for index, loss in enumerate(self.losses):
            view = view_of(loss, scores, sides, columns, _own(estimates or {}, index))
            output = loss(view)
            _check_output(loss, output, view)
            values = output.loss if row_weight is None else _weighted(output.loss, row_weight, loss, view, sides)
            sums.append(values.sum())
            own = {f"loss/{self.labels[index]}": values.detach()} if len(self.losses) > 1 else {}
            metrics = {**output.metrics, **own, **metrics}
        return torch.stack(sums), metrics

    def combine(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss of a step, or a micro-batch's share of it: weighted sums over the counts of the whole step.

        A term without a single unit in the step has the sum 0 and adds 0.
        """
        shares = sums / counts.to(sums).clamp(min=1)
        # One by one: a tensor of the weights would be copied to the device at every micro-batch.
        return sum((weight * share for weight, share in zip(self.weights, shares, strict=True)), sums.new_zeros(()))


def view_of(
    loss: Loss,
    scores: TokenScores,
    sides: Sides,
    columns: Mapping[str, Tensor],
    estimates: Mapping[str, Tensor | float],
) -> Pairs | Completions:
    """A micro-batch as a loss asks to see it."""
    return build_view(
        loss.needs,
        scores,
        paired=sides.paired,
        desirable_size=sides.desirable_size,
        desirable_tokens=sides.desirable_tokens,
        target_size=sides.target_size,
        target_tokens=sides.target_tokens,
        columns=columns,
        estimates=estimates,
        name=loss.name,
    )


def _count(loss: Loss, sides: Sides) -> int:
    desirable = loss.needs.completions == "desirable"
    counts = {
        "pair": sides.desirable_size,
        "completion": sides.desirable_size if desirable else sides.size,
        "token": sides.desirable_tokens if desirable else sides.tokens,
    }
    return counts[loss.unit]


def _asks_plainly(loss: Loss) -> bool:
    """Whether the loss asks to know something of the whole step from the rows themselves."""
    return type(loss).estimates is not Loss.estimates and not type(loss).needs.mismatched


def _check_terms(terms: Sequence[tuple[float, Loss]]) -> None:
    if not terms:
        raise RecipeError("loss: at least one loss is needed")
    for position, (weight, loss) in enumerate(terms):
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise RecipeError(f"loss_weights: `{loss.name}` has weight {weight!r}; it must be a number, 0 or more")
        if any(loss == other for _, other in terms[:position]):
            raise RecipeError(f"loss: {loss} stands there twice; add the two weights instead")
    if not any(weight for weight, _ in terms):
        raise RecipeError("loss_weights: all weights are 0, so there is nothing to train on")


def _labels(losses: Sequence[Loss]) -> tuple[str, ...]:
    """Names of the terms; the second term of one kind is called `<name>_2`."""
    seen: list[str] = []
    labels = []
    for loss in losses:
        seen.append(loss.name)
        labels.append(loss.name if seen.count(loss.name) == 1 else f"{loss.name}_{seen.count(loss.name)}")
    return tuple(labels)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _own(estimates: Mapping[str, Tensor | float], index: int) -> dict[str, Tensor | float]:
    prefix = f"{index}/"
    return {key.removeprefix(prefix): value for key, value in estimates.items() if key.startswith(prefix)}


def _check_output(loss: Loss, output: LossOutput, view: Pairs | Completions) -> None:
    expected = (view.units(loss.unit),)
    if output.unit != loss.unit or output.loss.shape != expected:
        raise ValueError(
            f"`{loss.name}` gave values of shape {tuple(output.loss.shape)} per {output.unit}; "
            f"it declares unit {loss.unit}, so shape {expected}"
        )


def _weighted(values: Tensor, row_weight: Tensor, loss: Loss, view: Pairs | Completions, sides: Sides) -> Tensor:
    """Values times the weight of the row that each belongs to."""
    weight = per_unit(row_weight.detach(), loss.needs, paired=sides.paired, desirable_size=sides.desirable_size)
    if loss.unit == "token" and isinstance(view, Completions):
        weight = weight[view.scores.sequence]
    return values * weight.to(values)
