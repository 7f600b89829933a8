"""The answers of token rows, each addressed by what is read and what is scored of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

TARGET = "target"
"""The column that holds an answer, beside the two of a pair."""

SIDES = ("chosen", "rejected", "completion", "mismatched", TARGET)


def sides_in(row: Mapping[str, Any]) -> Iterator[str]:
    """Names of the answers a token row holds."""
    return (side for side in SIDES if f"{side}_ids" in row)


def prompt_of(row: Mapping[str, Any], side: str) -> Any:
    """Ids of the prompt an answer follows: the row's, but for a target with one of its own."""
    own = row.get(f"{side}_prompt_ids")
    return row["prompt_ids"] if own is None else own


def answer_id(row: Mapping[str, Any], side: str) -> bytes:
    """SHA-256 of an answer's token ids, prompt included, and its scored positions.

    Nothing else of a row changes the scores of its tokens, so this is what stored scores are found by.
    """
    prompt, ids = (np.asarray(part).astype("<i4") for part in (prompt_of(row, side), row[f"{side}_ids"]))
    positions = len(prompt) + np.flatnonzero(row[f"{side}_scored"])
    digest = hashlib.sha256((len(prompt) + len(ids)).to_bytes(8, "little"))
    for part in (prompt, ids, positions.astype("<i4")):
        digest.update(part.tobytes())
    return digest.digest()
