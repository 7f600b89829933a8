"""Which answers of some data sets a reference has to score, and laying the scores beside the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefopt.data.answers import prompt_of
from prefopt.data.collation import Batch, Collator, Row
from prefopt.data.dataset import TokenDataset


@dataclass(frozen=True)
class Answer:
    """One answer of a token row."""

    row: Row
    side: str

    @property
    def tokens(self) -> int:
        """Tokens the backbone reads, prompt included."""
        return len(prompt_of(self.row, self.side)) + len(self.row[f"{self.side}_ids"])

    @property
    def length(self) -> int:
        """Scored tokens."""
        return int(np.count_nonzero(self.row[f"{self.side}_scored"]))


def answers_of(datasets: Iterable[TokenDataset], *, all_completions: bool) -> dict[bytes, Answer]:
    """Every distinct answer by its id; `all_completions` False leaves the rejected answers of pairs out."""
    return {
        id: Answer(row, side)
        for data in datasets
        for row, ids in zip(data.rows, data.answer_ids, strict=True)
        for side, id in _read(ids, all_completions)
    }


def with_scores(
    data: TokenDataset, scores: Mapping[bytes, Any], column: str, key: str, *, all_completions: bool
) -> TokenDataset:
    """The data set with the scores of each answer as `<side>_<column>`; the rows given stay as they are."""
    rows = [
        {**row, **{f"{side}_{column}": scores[id] for side, id in _read(ids, all_completions)}}
        for row, ids in zip(data.rows, data.answer_ids, strict=True)
    ]
    return replace(data, rows=rows, reference=key)


def batches_of(answers: Mapping[bytes, Answer], rows: int, missing: Collection[bytes]) -> list[list[bytes]]:
    """The `missing` ids among `answers` in batches of `rows` of the longest answer, or more shorter ones.

    Batches are made of all `answers`, and those that lack nothing fall out. So a run that was killed between two
    batches goes on with the batches it would have had, and rounding gives the same bits. What is missing here and
    there is put together. Longest first: memory runs out in the first batch or never.
    """
    batches = _batches(answers, answers, rows)
    whole = [batch for batch in batches if all(id in missing for id in batch)]
    rest = set(missing).difference(*whole)
    return sorted([*whole, *_batches(rest, answers, rows)], key=lambda batch: -answers[batch[0]].tokens)


def _batches(ids: Iterable[bytes], answers: Mapping[bytes, Answer], rows: int) -> list[list[bytes]]:
    order = sorted(ids, key=lambda id: (-answers[id].tokens, id))
    batches: list[list[bytes]] = []
    budget = rows * answers[order[0]].tokens if order else 0
    for id in order:
        if batches and answers[batches[-1][0]].tokens * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(id)
        else:
            batches.append([id])
    return batches


def plan_of_answers(answers: Sequence[Answer], collator: Collator) -> Batch:
    """The gather plan of some answers, in their order; of none, a batch that scores nothing."""
    rows: list[dict[str, Any]] = [
        {
            "prompt_ids": prompt_of(answer.row, answer.side),
            "completion_ids": answer.row[f"{answer.side}_ids"],
            "completion_scored": answer.row[f"{answer.side}_scored"],
            "desirable": True,
            "columns": {},
            "row": index,
        }
        for index, answer in enumerate(answers)
    ]
    return collator(rows)


def _read(ids: Mapping[str, bytes], all_completions: bool) -> list[tuple[str, bytes]]:
    return [(side, id) for side, id in ids.items() if all_completions or side != "rejected"]
