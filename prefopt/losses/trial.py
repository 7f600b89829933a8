"""A trial call: every loss is asked once about made-up scores, before any weights are loaded.

Mistakes in a new loss show in its first call, which without a trial comes after minutes of loading and scoring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.losses.base import SEGMENT_COLUMNS, TARGET, Loss, LossOutput
from prefopt.losses.objective import Objective, Sides, view_of
from prefopt.losses.registry import origin
from prefopt.losses.views import Completions, Pairs, UndeclaredColumn
from prefopt.scoring.scores import STATISTICS, MissingStatistic, TokenScores

# Two sizes: a mean over the rows, or a constant, has the same shape in both.
_ROWS = (2, 3)
_MOST_OPTIONAL = 4
_DECLARED_AS = {
    "ref_logp": 'reference="logp"',
    "forward_kl": 'reference="distribution", statistics=("forward_kl",)',
    "reverse_kl": 'reference="distribution", statistics=("reverse_kl",)',
    "entropy": 'statistics=("entropy",)',
    "turn": "turns=True",
    "segment": "turns=True",
}


def try_losses(losses: Iterable[Loss]) -> None:
    """Call each loss on made-up rows. `UserError` with its file, what it gave and what is asked for.

    A loss whose `row_problem` objects to every made-up row is not tried.
    """
    for loss in losses:
        try:
            fault = _fault(loss)
        except MissingStatistic as error:
            raise _refusal(loss, f"it reads `{error.name}`: say Needs({_DECLARED_AS[str(error.name)]})") from error
        except UndeclaredColumn as error:
            raise _refusal(loss, str(error)) from error
        except Exception as error:
            raise _refusal(loss, f"a call on made-up scores failed: {type(error).__name__}: {error}") from error
        if fault:
            raise _refusal(loss, fault)


def _refusal(loss: Loss, fault: str) -> UserError:
    name, file = origin(type(loss))
    return UserError(f"{file}: loss `{loss.name}` ({name}): {fault}")


def _fault(loss: Loss) -> str:
    """What is wrong with the values of a loss; empty when nothing is, or when no made-up row will do."""
    numbers = _accepted(loss)
    if numbers is None:
        return ""
    for rows in _ROWS:
        scores, sides = _scores(rows, target=TARGET in loss.needs.columns)
        columns = {name: torch.full((rows,), number) for name, number in numbers.items()}
        view = view_of(loss, scores, sides, columns, _estimates(loss, scores, sides, columns))
        with torch.enable_grad():
            fault = _output_fault(loss, loss(view), view, scores.logp)
        if fault:
            return fault
    return ""


def _output_fault(loss: Loss, output: object, view: Pairs | Completions, logp: Tensor) -> str:
    if not isinstance(output, LossOutput):
        return f"it returned {_shown(output)}: LossOutput(values, self.unit) is asked, one value for each {loss.unit}"
    if output.unit != loss.unit:
        return f"it returned the unit {output.unit!r}, and declares {loss.unit!r}: write LossOutput(values, self.unit)"
    values, units = output.loss, view.units(loss.unit)
    if not isinstance(values, Tensor) or values.shape != (units,):
        averaged = "do not average: " if isinstance(values, Tensor) and values.numel() == 1 else ""
        return (
            f"it returned {_shown(values)} for {units} {loss.unit}s: {averaged}one value for each {loss.unit} "
            f"is asked, shape ({units},)"
        )
    for name, metric in output.metrics.items():
        if metric.dim() != 1:
            return f"metric `{name}` is {_shown(metric)}: give one number for each {loss.unit}, not their mean"
    return _value_fault(loss, values, logp)


def _value_fault(loss: Loss, values: Tensor, logp: Tensor) -> str:
    slope = torch.autograd.grad(values.sum(), logp, allow_unused=True)[0] if values.requires_grad else None
    if slope is None:
        return "it returned values without a gradient: do not detach them from the policy's log-probabilities"
    if not values.isfinite().all():
        return f"it returned {values.tolist()} for log-probabilities from -2 to 0: finite values are asked"
    if not slope.isfinite().all():
        return "its gradient is not finite for log-probabilities from -2 to 0"
    return ""


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.60}"
    return "a single number" if value.dim() == 0 else f"a tensor of shape {tuple(value.shape)}"


def _scores(rows: int, *, target: bool) -> tuple[TokenScores, Sides]:
    """Scores of chosen and rejected answers of one to three tokens, with every statistic, and their sides."""
    lengths = [1 + index % 3 for index in range((3 if target else 2) * rows)]
    steps = torch.arange(sum(lengths), dtype=torch.float32)
    logp = (-0.1 - (0.7 * steps) % 1.8).requires_grad_()
    given = {name: torch.full_like(steps, 0.25) for name in STATISTICS if name not in ("logp", "ref_logp")}
    scores = TokenScores(
        len(lengths),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        logp,
        -0.1 - (1.1 * steps) % 1.8,
        turn=torch.cat([torch.arange(length) for length in lengths]),
        segment=torch.ones_like(steps),
        **given,
    )
    size, tokens = 2 * rows, sum(lengths[: 2 * rows])
    rest = len(lengths) - size, sum(lengths[size:])
    return scores, Sides(True, size, tokens, rows, sum(lengths[:rows]), *rest)


def _estimates(loss: Loss, scores: TokenScores, sides: Sides, columns: dict[str, Tensor]) -> dict[str, Tensor | float]:
    parts = Objective([(1.0, loss)]).estimates(scores, sides, columns, mismatched=loss.needs.mismatched)
    return {name.removeprefix("0/"): (total / count).item() for name, (total, count) in parts.items()}


def _accepted(loss: Loss) -> dict[str, float] | None:
    """Numbers in the declared columns that `row_problem` takes, with as few optional ones as will do; else None."""
    no_number = (TARGET, *SEGMENT_COLUMNS)
    required = [name for name in loss.needs.columns if name not in no_number]
    optional = [name for name in loss.needs.optional_columns if name not in no_number][:_MOST_OPTIONAL]
    sets = itertools.chain.from_iterable(itertools.combinations(optional, count) for count in range(len(optional) + 1))
    rows = (row for more in sets for row in _numbers([*required, *more]))
    return next((row for row in rows if not loss.row_problem(row)), None)


def _numbers(columns: list[str]) -> Iterator[dict[str, float]]:
    """Rows that some loss may take: equal numbers of each kind, and numbers that fall or rise from column to column."""
    for number in (0.5, 1.0, 2.0, 0.0, -1.0):
        yield dict.fromkeys(columns, number)
    places = range(1, len(columns) + 1)
    yield dict(zip(columns, map(float, reversed(places)), strict=True))
    yield dict(zip(columns, map(float, places), strict=True))
