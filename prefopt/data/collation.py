"""Token rows -> a gather plan: the ids the backbone reads, and the flat list of positions that are scored.

Letters: `B` rows, `C` completions, `R` backbone rows, `T` padded length, `M` scored tokens. Completions come chosen (or
desirable) first and targets last, so each side of every view is a slice. Prompt and padding positions appear in no
list: they never meet the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from prefopt.data.answers import TARGET

Row = Mapping[str, Any]
Batch = dict[str, Any]

# The part of a batch that the model's forward takes; the rest says what the scores mean.
MODEL_KEYS = ("input_ids", "attention_mask", "source", "target")


@dataclass(frozen=True)
class _Completion:
    prompt: np.ndarray
    ids: np.ndarray
    scored: np.ndarray
    ref_logp: np.ndarray | None


@dataclass(frozen=True)
class Collator:
    """Builds the batch of a list of token rows; an empty list gives one unscored row, so that every rank can take part.

    The batch holds `input_ids`, `attention_mask` `[R,T]` (padded on the right), `source` `[M]` (index into the
    flattened `R*T` hidden states that predicts the token), `target` `[M]`, `sequence` `[M]` (completion), `columns`
    (`{name: [B]}`), `row` `[B]` (position in the source), and the numbers `paired`, `size`, `desirable_size`,
    `desirable_tokens`, `target_size`, `target_tokens` and `tokens` (all that is read, padding left out). Rows that
    carry their reference scores add `ref_logp` `[M]`; with `mismatched` a batch of the same rows, each prompt before
    the answer it was matched with, lies beside under that name. Unpaired rows are put in the order of their
    completions. With `all_completions=False` only chosen (desirable) ones are laid out; with `targets` the targets of
    pairs as well.
    """

    pad_token_id: int = 0
    paired: bool = True
    all_completions: bool = True
    targets: bool = False
    mismatched: bool = False
    columns: tuple[str, ...] = ()
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Row]) -> Batch:
        rows = sorted(rows, key=lambda row: not row.get("desirable", True))
        desirable, other = self._sides(rows)
        targets = [_completion(row, TARGET) for row in rows] if self.targets else []
        completions = desirable + other + targets
        batch = self._lay_out(completions)
        lengths = [int(completion.scored.sum()) for completion in completions]
        batch["sequence"] = torch.from_numpy(np.repeat(np.arange(len(completions)), lengths))
        batch["columns"] = {name: torch.tensor([row["columns"][name] for row in rows]) for name in self.columns}
        known = [completion.ref_logp for completion in completions if completion.ref_logp is not None]
        if known and len(known) == len(completions):
            batch["ref_logp"] = torch.from_numpy(np.concatenate(known))
        batch["row"] = torch.tensor([row["row"] for row in rows], dtype=torch.int64)
        batch["paired"] = self.paired
        batch["size"] = len(completions)
        batch["desirable_size"] = len(desirable)
        batch["desirable_tokens"] = sum(lengths[: len(desirable)])
        batch["target_size"] = len(targets)
        batch["target_tokens"] = sum(lengths[len(lengths) - len(targets) :])
        batch["tokens"] = sum(len(c.prompt) + len(c.ids) for c in completions)
        if self.mismatched:
            batch["mismatched"] = replace(self, mismatched=False)([_mismatched(row) for row in rows])
        return batch

    def _sides(self, rows: Sequence[Row]) -> tuple[list[_Completion], list[_Completion]]:
        desirable: list[_Completion] = []
        other: list[_Completion] = []
        for row in rows:
            if self.paired:
                desirable.append(_completion(row, "chosen"))
                other.append(_completion(row, "rejected"))
            else:
                (desirable if row["desirable"] else other).append(_completion(row, "completion"))
        return desirable, other if self.all_completions else []

    def _lay_out(self, completions: Sequence[_Completion]) -> Batch:
        lengths = [len(c.prompt) + len(c.ids) for c in completions] or [1]
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = np.full((len(lengths), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(lengths), width), dtype=np.int64)
        mask[0, 0] = 1  # the unscored row of an empty batch still attends to one token
        source, target = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for index, completion in enumerate(completions):
            start, stop = len(completion.prompt), lengths[index]
            ids[index, :start], ids[index, start:stop] = completion.prompt, completion.ids
            mask[index, :stop] = 1
            scored = np.flatnonzero(completion.scored)
            # The hidden state at position t - 1 predicts the token at t.
            source.append(index * width + start + scored - 1)
            target.append(completion.ids[scored].astype(np.int64))
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "source": torch.from_numpy(np.concatenate(source)),
            "target": torch.from_numpy(np.concatenate(target)),
        }


def row_length(row: Row, rejected: bool = True) -> int:
    """Tokens the backbone reads for a row in the plain layout: what rows are grouped by."""
    wanted = ("chosen_ids", "completion_ids", *(("rejected_ids", f"{TARGET}_ids") if rejected else ()))
    sides = [name for name in wanted if name in row]
    return sum(len(row["prompt_ids"]) + len(row[name]) for name in sides)


def _mismatched(row: Row) -> Row:
    parts = ("ids", "scored", "ref_logp")
    return {**row, **{f"completion_{part}": row.get(f"mismatched_{part}") for part in parts}}


def _completion(row: Row, side: str) -> _Completion:
    prompt, ids, scored = (np.asarray(row[key]) for key in ("prompt_ids", f"{side}_ids", f"{side}_scored"))
    return _Completion(prompt, ids, scored, row.get(f"{side}_ref_logp"))
