"""A second stream of rows: beside each pair an answer to another prompt, which a loss imitates (SLiC's D_SFT).

Which pair gets which target follows from the seed and the contents of the rows, like everything else that is known
before training: no shuffle, split into batches or resume can change it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from prefopt.data.answers import TARGET
from prefopt.data.collation import Row
from prefopt.data.dataset import TokenDataset
from prefopt.errors import DataError


def with_targets(data: TokenDataset, targets: TokenDataset, seed: int = 0) -> TokenDataset:
    """Pairs, each with one of `targets`, single answers to prompts of their own: `target_prompt_ids` and the rest.

    Both are put in an order drawn by `seed`; fewer targets than pairs come round again, and of more some are left over.
    Raises `DataError` for rows that are no pairs, have a target already, or cannot be one.
    """
    if not data.paired:
        raise DataError("targets: they stand beside pairs, and the rows are single answers. Use a loss of pairs")
    if TARGET in data.columns:
        raise DataError(f"targets: the rows have a column `{TARGET}` already. Keep one of the two")
    if targets.paired:
        raise DataError("targets: the rows are pairs; give rows of `prompt` and `completion`")
    bad = next((row for row in targets.rows if not row.get("desirable", True)), None)
    if bad is not None:
        raise DataError(f"targets, row {bad['row']}: a target is imitated, and this answer is labelled undesirable")
    order, given = _drawn(data, "chosen", seed), _drawn(targets, "completion", seed)
    rows: list[Row] = list(data.rows)
    for place, index in enumerate(order):
        target = targets.rows[given[place % len(given)]]
        parts = {
            "target_prompt_ids": "prompt_ids",
            "target_ids": "completion_ids",
            "target_scored": "completion_scored",
        }
        rows[index] = {**rows[index], **{ours: target[theirs] for ours, theirs in parts.items()}}
    return replace(data, rows=rows, reports={**data.reports, "targets": targets.reports}, reference="")


def _drawn(data: TokenDataset, side: str, seed: int) -> list[int]:
    draws = [hashlib.sha256(f"{seed} ".encode() + ids[side]).digest() for ids in data.answer_ids]
    return sorted(range(len(data)), key=draws.__getitem__)
