"""Single answers, and each prompt with an answer that belongs to another one.

On such mismatched rows KTO estimates how far the policy has moved from its reference: they are draws from neither side
of any preference. A row's partner follows from the seed and the contents of the rows, so no split into batches or
ranks, no shuffle and no resume can change it, and its reference scores are kept like those of any other row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.data.dataset import TokenDataset

MISMATCHED = "mismatched"


def single_answers(data: TokenDataset) -> TokenDataset:
    """The answers of pairs one by one, chosen ones desirable and rejected ones not; single answers as they are."""
    if not data.paired:
        return data
    rows = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row[f"{side}_ids"],
            "completion_scored": row[f"{side}_scored"],
            "desirable": side == "chosen",
            "columns": row["columns"],
            "row": row["row"],
        }
        for row in data.rows
        for side in ("chosen", "rejected")
    ]
    return TokenDataset(rows, data.reports)


def has_mismatched(data: TokenDataset) -> bool:
    """Whether every row has its mismatched answer already."""
    return f"{MISMATCHED}_ids" in data.rows[0]


def with_mismatched(data: TokenDataset, seed: int, max_length: int | None) -> tuple[TokenDataset, int]:
    """Single answers, each with the answer of another prompt as `mismatched_ids` and `mismatched_scored`, and how many
    found no other prompt and keep an answer to their own.

    A partner's answer is cut where it would pass `max_length` tokens behind this prompt.
    """
    partners, unmatched = _partners(data, seed)
    rows = []
    for row, partner in zip(data.rows, partners, strict=True):
        room = None if max_length is None else max(1, max_length - len(row["prompt_ids"]))
        other = data.rows[partner]
        cut = {f"{MISMATCHED}_{part}": other[f"completion_{part}"][:room] for part in ("ids", "scored")}
        rows.append({**row, **cut})
    return replace(data, rows=rows, reference=""), unmatched


def _partners(data: TokenDataset, seed: int) -> tuple[list[int], int]:
    """For each row the next one, in an order drawn by `seed`, that answers another prompt."""
    order = sorted(range(len(data)), key=lambda index: _draw(seed, data.answer_ids[index]))
    prompts = [np.asarray(data.rows[index]["prompt_ids"], "<i4").tobytes() for index in order]
    count, partners = len(order), [0] * len(order)
    if len(set(prompts)) == 1:
        for place, index in enumerate(order):
            partners[index] = order[(place + 1) % count]
        return partners, count
    # Twice round from the back: by the second time the next place with another prompt is known everywhere.
    other = [0] * count
    for place in reversed(range(2 * count)):
        here, after = place % count, (place + 1) % count
        other[here] = other[after] if prompts[here] == prompts[after] else after
    for place, index in enumerate(order):
        partners[index] = order[other[place]]
    return partners, 0


def _draw(seed: int, ids: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(f"{seed} ".encode() + ids["completion"]).digest()
