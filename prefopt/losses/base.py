"""What a loss is: a frozen dataclass of knobs, one `needs`, one call from a view to unreduced values.

Letters: `B` rows (pairs, or single answers), `M` scored tokens, `K` units of the loss: what one value belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from prefopt.errors import UserError
from prefopt.losses.knobs import knobs_of
from prefopt.scoring.scores import STATISTICS

View = Literal["pairs", "completions"]
Side = Literal["all", "desirable"]
Reference = Literal["none", "logp", "distribution"]
Unit = Literal["pair", "completion", "token"]

TARGET = "target"
"""The column that holds an answer."""

SEGMENT_COLUMNS = ("segments", "turn_weights")
"""The columns that say which turns of a pair count, and how much."""

_EXTRA_STATISTICS = tuple(name for name in STATISTICS if name not in ("logp", "ref_logp"))
_OF_TWO_DISTRIBUTIONS = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Needs:
    """What the system must compute for a loss; whatever is not declared here cannot be read.

    `view`: answers two by two, or each alone. `completions`: the answers a completions view holds; "desirable" leaves
    the rest out of the forward. `reference`: "logp" gives `ref_logp`, "distribution" also allows the two KLs.
    `statistics`: per-token numbers beyond `logp` and `ref_logp`. `mismatched`: `estimates` is asked about prompts with
    answers to other prompts, not about the rows themselves. `turns`: the assistant turn of each token (`turn`), and
    what it weighs (`segment`) where the rows have a declared column for that. `columns`: numbers the data must have for
    each row; `optional_columns`: those the loss uses where the data has them. Three columns are no numbers: `target` is
    a third answer to the prompt of a pair, scored like the two; `segments` and `turn_weights` make `segment`.
    """

    view: View = "pairs"
    completions: Side = "all"
    reference: Reference = "none"
    statistics: tuple[str, ...] = ()
    mismatched: bool = False
    turns: bool = False
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in {"view": View, "completions": Side, "reference": Reference}.items():
            _one_of(f"needs.{name}", getattr(self, name), get_args(choices))
        for name in ("statistics", "columns", "optional_columns"):
            if not isinstance(getattr(self, name), tuple):
                raise UserError(f"needs.{name} is {getattr(self, name)!r}: write a tuple of names, ('a',) for one")
        for name in self.statistics:
            _one_of("needs.statistics", name, _EXTRA_STATISTICS)
            if name in _OF_TWO_DISTRIBUTIONS and self.reference != "distribution":
                raise UserError(f"needs.statistics: `{name}` compares two distributions: say reference='distribution'")
        if self.view == "pairs" and self.completions != "all":
            raise UserError("needs.completions: a pairs view reads both sides; 'desirable' is for a completions view")
        if self.mismatched and (self.view, self.completions) != ("completions", "all"):
            raise UserError("needs.mismatched: a mismatched answer has no other side; say view='completions'")
        if (not self.turns or self.view != "pairs") and set(SEGMENT_COLUMNS) & set(
            self.columns + self.optional_columns
        ):
            raise UserError("needs: `segments` and `turn_weights` are about the turns of a pair; say turns=True")
        if self.view != "pairs" and TARGET in self.columns + self.optional_columns:
            raise UserError("needs: `target` is an answer beside the two of a pair; say view='pairs'")
        if twice := set(self.columns) & set(self.optional_columns):
            raise UserError(f"needs: {sorted(twice)} are both required and optional columns")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Values of a loss: `loss` `[K]`, unreduced, one for each `unit`; `metrics` `{name: [n]}`, detached here."""

    loss: Tensor
    unit: Unit
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", {name: value.detach() for name, value in self.metrics.items()})


@dataclass(frozen=True)
class Loss(ABC):
    """Base of every loss. Subclasses are frozen dataclasses that set `needs` and define `__call__`.

    `unit` is what a value belongs to; it is a fact of the class because a step's loss is divided by the number of its
    units over all ranks, which must be known before the first forward.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[Needs]
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        for knob in knobs_of(type(self)):
            value = knob.checked(getattr(self, knob.name), self.name or type(self).__name__)
            object.__setattr__(self, knob.name, value)

    @abstractmethod
    def __call__(self, view: Any) -> LossOutput:
        """The values for a `Pairs` or `Completions` view, as `needs.view` says."""

    def estimates(self, view: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """`{name: (sum, count)}` of what the loss must know over the whole step; back as `view.estimates[name]`."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What may surprise about these knobs, a line each, for the start of the log."""
        return ()

    def class_notes(self, good: int, bad: int) -> list[str]:
        """What to read before step 1 on a data set with so many desirable and other answers, a line each."""
        return []

    def row_problem(self, columns: Mapping[str, float]) -> str:
        """Why a row with these declared columns cannot be trained on; empty when it can. Asked before training."""
        return ""


def _one_of(where: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{where} is {value!r}: it must be one of {', '.join(choices)}")
