"""The tokenised data set a trainer reads: rows in memory, their lengths, and what was left out on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from prefopt.data.collation import Row, row_length
from prefopt.errors import DataError


@dataclass(frozen=True)
class TokenDataset:
    """Token rows of one kind (pairs, or single labelled completions) and the reports of the passes that made them."""

    rows: Sequence[Row]
    reports: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise DataError("no row is left to train on: every one was refused or dropped")
        if len({("chosen_ids" in row) for row in self.rows}) > 1:
            raise DataError("some rows are pairs and some are single completions: split them into two data sets")

    @property
    def paired(self) -> bool:
        """Whether a row is a chosen and a rejected answer, rather than one labelled completion."""
        return "chosen_ids" in self.rows[0]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens the backbone reads for each row."""
        return [row_length(row) for row in self.rows]

    @cached_property
    def desirable_lengths(self) -> list[int]:
        """As `lengths`, for a loss that leaves the rejected answers of pairs out of the forward."""
        return [row_length(row, rejected=False) for row in self.rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numeric columns every row carries."""
        return tuple(self.rows[0]["columns"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
