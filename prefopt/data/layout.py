"""Where the tokens of completions lie in the rows a backbone reads, and which position predicts each scored one.

`plain`: a row is a prompt and one answer. `shared`: a row is a prompt and all the answers that follow it, each a
branch: its positions go on from the prompt's end, and it sees the prompt and itself alone. Scores are the same; the
prompt is computed once. Letters: `R` rows, `T` padded length, `M` scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYOUTS = ("plain", "shared")
PADDING = -1  # the branch of a position that holds no token

# The width at which attention over a row costs as much as everything else, in a model some 700 units wide.
_EVEN = 4096

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Completion:
    """An answer and the prompt before it; `scored` `[n]` says which of its tokens count, `segment` `[n]` how much."""

    prompt: np.ndarray
    ids: np.ndarray
    scored: np.ndarray
    ref_logp: np.ndarray | None
    reference: Any  # numbers that stay in a store, with `read`; None where there are none
    segment: np.ndarray | None = None


@dataclass(frozen=True)
class _Tree:
    """One row: a prompt, and the completions (by number) that follow it."""

    prompt: np.ndarray
    answers: list[int]
    length: int


def lay_out(completions: Sequence[Completion], *, shared: bool, pad_token_id: int, multiple: int) -> tuple[Arrays, int]:
    """The rows of some completions, padded on the right to a `multiple`, and the number of tokens in them.

    Always `input_ids` `[R,T]`, `source` and `target` `[M]`, in the order of the completions. Where answers share a row,
    `branch` `[R,T]` (0 prompt, 1 and on the answers, `PADDING`) and `position_ids` `[R,T]` go with them, and
    `attention_mask` `[R,T]` otherwise. No completions give one row that scores nothing.
    """
    trees = _shared(completions) if shared else _plain(completions)
    width = -(-max((tree.length for tree in trees), default=1) // multiple) * multiple
    shape = (max(1, len(trees)), width)
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    branch = np.full(shape, PADDING, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    source: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(completions)
    for row, tree in enumerate(trees):
        start = len(tree.prompt)
        ids[row, :start], branch[row, :start], positions[row, :start] = tree.prompt, 0, np.arange(start)
        end = start
        for number, index in enumerate(tree.answers, 1):
            answer = completions[index]
            here = slice(end, end + len(answer.ids))
            ids[row, here], branch[row, here] = answer.ids, number
            positions[row, here] = start + np.arange(len(answer.ids))
            source[index] = row * width + _predecessors(np.flatnonzero(answer.scored), start, end)
            end = here.stop
    target = [completion.ids[completion.scored].astype(np.int64) for completion in completions]
    arrays = {"input_ids": ids, "source": _joined(source), "target": _joined(target)}
    if any(len(tree.answers) > 1 for tree in trees):
        arrays |= {"branch": branch, "position_ids": positions}
    else:
        arrays["attention_mask"] = (branch != PADDING).astype(np.int64)
        arrays["attention_mask"][len(trees) :, 0] = 1  # the unscored row of an empty batch still attends to one token
    return arrays, sum(tree.length for tree in trees)


def _predecessors(scored: np.ndarray, prompt: int, start: int) -> np.ndarray:
    """The places that predict the `scored` tokens of an answer that starts at `start`: the token before each, and the
    last of the `prompt` for the first."""
    return np.where(scored == 0, prompt - 1, start + scored - 1)


def _plain(completions: Sequence[Completion]) -> list[_Tree]:
    return [_Tree(each.prompt, [index], len(each.prompt) + len(each.ids)) for index, each in enumerate(completions)]


def _shared(completions: Sequence[Completion]) -> list[_Tree]:
    """The trees of the answers, at the limit of their length that costs least: long ones pad all the others."""
    by_prompt: dict[bytes, list[int]] = {}
    for index, completion in enumerate(completions):
        by_prompt.setdefault(completion.prompt.tobytes(), []).append(index)
    groups = list(by_prompt.values())
    whole = {len(completions[group[0]].prompt) + sum(len(completions[i].ids) for i in group) for group in groups}
    least = max((len(each.prompt) + len(each.ids) for each in completions), default=0)
    limits = sorted({max(least, length) for length in whole}, reverse=True)
    return min((_within(limit, groups, completions) for limit in limits), key=_cost, default=[])


def _within(limit: int, groups: Sequence[Sequence[int]], completions: Sequence[Completion]) -> list[_Tree]:
    """The answers of each group in as few rows as hold them, none longer than `limit`."""
    trees: list[_Tree] = []
    for group in groups:
        prompt = completions[group[0]].prompt
        tree = _Tree(prompt, [], len(prompt))
        for index in group:
            length = len(completions[index].ids)
            if tree.answers and tree.length + length > limit:
                trees.append(tree)
                tree = _Tree(prompt, [], len(prompt))
            tree = _Tree(prompt, [*tree.answers, index], tree.length + length)
        trees.append(tree)
    return trees


def _cost(trees: Sequence[_Tree]) -> int:
    width = max(tree.length for tree in trees)
    return len(trees) * width * (_EVEN + width)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
