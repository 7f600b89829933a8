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

from prefopt.data.answers import TARGET, prompt_of
from prefopt.data.layout import Completion, lay_out
from prefopt.data.turns import turn_of_tokens

Row = Mapping[str, Any]
Batch = dict[str, Any]

# The part of a batch that the model's forward takes; the rest says what the scores mean.
MODEL_KEYS = ("input_ids", "attention_mask", "branch", "position_ids", "source", "target")


@dataclass(frozen=True)
class Collator:
    """Builds the batch of a list of token rows; an empty list gives one unscored row, so that every rank can take part.

    The batch holds what the backbone reads (see `lay_out`; `shared` says whether answers share the row of their
    prompt), `source` `[M]` (index into the flattened `R*T` hidden states that predicts the token), `target` `[M]`,
    `sequence` `[M]` (completion), `columns` (`{name: [B]}`), `row` `[B]` (position in the source), and the numbers
    `paired`, `size`, `desirable_size`, `desirable_tokens`, `target_size`, `target_tokens` and `tokens` (of all
    completions, each with its prompt). With `turns` there is `turn` `[M]`, the assistant turn of each token, and for
    rows with segments `segment` `[M]`, what that turn weighs; targets weigh 1. `reading` is `{name: (sum, count)}` of
    what the layout makes of these: `padding`, the share of positions that hold no token, and `unique_tokens`, those a
    row of the data brings, with what is shared counted once. Rows that carry their reference scores add `ref_logp`
    `[M]`, and those that know where more of it is stored `reference` `[M, D]`; with `mismatched` a batch of the same
    rows, each prompt before the answer it was matched with, lies beside under that name. Unpaired rows are put in the
    order of their completions. With `all_completions=False` only chosen (desirable) ones are laid out; with `targets`
    the targets of pairs as well. `masks_padding` False leaves `attention_mask` out of plain rows: padding comes last,
    where no token of a causal model sees it.
    """

    pad_token_id: int = 0
    paired: bool = True
    all_completions: bool = True
    targets: bool = False
    mismatched: bool = False
    turns: bool = False
    columns: tuple[str, ...] = ()
    pad_to_multiple_of: int = 1
    shared: bool = False
    masks_padding: bool = True

    def __call__(self, rows: Sequence[Row]) -> Batch:
        rows = sorted(rows, key=lambda row: not row.get("desirable", True))
        desirable, other = self._sides(rows)
        targets = [_completion(row, TARGET) for row in rows] if self.targets else []
        completions = desirable + other + targets
        batch = self._lay_out(completions, len(rows))
        lengths = [int(completion.scored.sum()) for completion in completions]
        batch["sequence"] = torch.from_numpy(np.repeat(np.arange(len(completions)), lengths))
        batch["columns"] = {name: torch.tensor([row["columns"][name] for row in rows]) for name in self.columns}
        if self.turns:
            batch |= _of_turns(completions)
        known = [completion.ref_logp for completion in completions if completion.ref_logp is not None]
        if known and len(known) == len(completions):
            batch["ref_logp"] = torch.from_numpy(np.concatenate(known))
        if stored := [completion.reference.read() for completion in completions if completion.reference is not None]:
            batch["reference"] = torch.cat(stored)
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

    def _sides(self, rows: Sequence[Row]) -> tuple[list[Completion], list[Completion]]:
        desirable: list[Completion] = []
        other: list[Completion] = []
        for row in rows:
            if self.paired:
                desirable.append(_completion(row, "chosen"))
                other.append(_completion(row, "rejected"))
            else:
                (desirable if row["desirable"] else other).append(_completion(row, "completion"))
        return desirable, other if self.all_completions else []

    def _lay_out(self, completions: Sequence[Completion], rows: int) -> Batch:
        arrays, read = lay_out(
            completions, shared=self.shared, pad_token_id=self.pad_token_id, multiple=self.pad_to_multiple_of
        )
        if not self.masks_padding:
            arrays.pop("attention_mask", None)
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        positions = batch["input_ids"].numel()
        batch["reading"] = {"padding": (positions - read, positions), "unique_tokens": (read, rows)}
        return batch


def _of_turns(completions: Sequence[Completion]) -> Batch:
    turns = [turn_of_tokens(completion.scored) for completion in completions]
    batch: Batch = {"turn": torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *turns]))}
    if any(completion.segment is not None for completion in completions):
        weights = [np.ones(len(c.ids), np.float32) if c.segment is None else c.segment for c in completions]
        scored = [weight[c.scored] for weight, c in zip(weights, completions, strict=True)]
        batch["segment"] = torch.from_numpy(np.concatenate(scored))
    return batch


def row_length(row: Row, rejected: bool = True) -> int:
    """Tokens of a row's answers, each with its prompt: what the backbone reads of it in the plain layout."""
    return sum(prompt + answer for prompt, answer in _lengths(row, rejected))


def row_width(row: Row, *, shared: bool, rejected: bool = True) -> int:
    """Tokens of the longest backbone row that a row of the data makes: what rows are grouped by, to save padding."""
    lengths = _lengths(row, rejected)
    if not shared:
        return max(prompt + answer for prompt, answer in lengths)
    apart = f"{TARGET}_prompt_ids" in row and rejected  # the target comes last, and has a row of its own
    together = lengths[:-1] if apart else lengths
    width = together[0][0] + sum(answer for _, answer in together)
    return max(width, sum(lengths[-1])) if apart else width


def _lengths(row: Row, rejected: bool) -> list[tuple[int, int]]:
    """Tokens of prompt and answer, for each answer that is read."""
    wanted = ("chosen", "completion", *(("rejected", TARGET) if rejected else ()))
    return [(len(prompt_of(row, side)), len(row[f"{side}_ids"])) for side in wanted if f"{side}_ids" in row]


def _mismatched(row: Row) -> Row:
    parts = ("ids", "scored", "ref_logp", "reference")
    return {**row, **{f"completion_{part}": row.get(f"mismatched_{part}") for part in parts}}


def _completion(row: Row, side: str) -> Completion:
    prompt, ids, scored = map(np.asarray, (prompt_of(row, side), row[f"{side}_ids"], row[f"{side}_scored"]))
    known = (row.get(f"{side}_{name}") for name in ("ref_logp", "reference", "segment"))
    return Completion(prompt, ids, scored, *known)
