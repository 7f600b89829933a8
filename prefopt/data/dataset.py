"""The tokenised data set a trainer reads: rows in memory, their lengths, and what was left out on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from prefopt.data.answers import TARGET, answer_id, sides_in
from prefopt.data.collation import Row, row_length, row_width
from prefopt.data.turns import SEGMENTS
from prefopt.errors import DataError


@dataclass(frozen=True)
class TokenDataset:
    """Token rows of one kind (pairs, or single labelled completions) and the reports of the passes that made them.

    `reference` is the key of the function whose scores the rows carry, or empty when they carry none.
    """

    rows: Sequence[Row]
    reports: dict[str, Any] = field(default_factory=dict)
    reference: str = ""

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
        """Tokens of each row's answers, each with its prompt."""
        return [row_length(row) for row in self.rows]

    def widths(self, *, shared: bool, rejected: bool = True) -> list[int]:
        """Tokens of the longest backbone row each row makes; `rejected` False where no loss reads those answers."""
        return [row_width(row, shared=shared, rejected=rejected) for row in self.rows]

    @cached_property
    def prompts(self) -> list[int]:
        """For each row a number that it has in common with the other rows of its prompt."""
        numbers: dict[bytes, int] = {}
        return [numbers.setdefault(np.asarray(row["prompt_ids"]).tobytes(), len(numbers)) for row in self.rows]

    @cached_property
    def answer_ids(self) -> list[dict[str, bytes]]:
        """For each row, the id of each of its answers (see `answer_id`)."""
        return [{side: answer_id(row, side) for side in sides_in(row)} for row in self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what training reads of the rows, in their order: answers, labels and columns."""
        digest = hashlib.sha256()
        for row, ids in zip(self.rows, self.answer_ids, strict=True):
            rest = [row.get("desirable"), sorted(row["columns"].items())]
            digest.update(repr([sorted(ids.items()), *rest]).encode())
            for side in sides_in(row):
                if f"{side}_segment" in row:
                    digest.update(np.asarray(row[f"{side}_segment"]).astype("<f4").tobytes())
        return digest.hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns every row carries beside prompt, answers and label."""
        target = (TARGET,) if f"{TARGET}_ids" in self.rows[0] else ()
        segments = (SEGMENTS,) if "chosen_segment" in self.rows[0] else ()
        return (*self.rows[0]["columns"], *target, *segments)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
