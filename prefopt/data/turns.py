"""The assistant's turns: which of them a row counts, and the same as lists over the tokens of an answer.

A turn is a run of scored tokens: what other roles say, and the markers around it, lie between two turns and are never
scored. So the turn of each token follows from the mask, in every layout and after every cut.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefopt.data.problems import Flaw, shown

if TYPE_CHECKING:
    from prefopt.data.formats import Example, Part
    from prefopt.data.truncation import Flags

SEGMENTS = "segments"
TURN_WEIGHTS = "turn_weights"
SEGMENT_COLUMNS = (SEGMENTS, TURN_WEIGHTS)
"""The columns that say which turns of a pair count, and how much."""

TURN_SIDES = ("chosen", "rejected")


# What a row says


def assistant_turns(part: Part | None) -> int:
    """How many turns of the assistant an answer holds; a text is one."""
    return sum(message["role"] == "assistant" for message in part) if isinstance(part, list) else 1


def segment_turns(example: Example, side: str) -> list[int]:
    """The turns of a side that count, from 0: those that `segments` names, or all of them."""
    segments = example.columns.get(SEGMENTS)
    if segments is None:
        return list(range(assistant_turns(getattr(example, side))))
    return list(segments[side]) if isinstance(segments, dict) else list(range(segments))


def turn_weights(example: Example, side: str) -> list[float]:
    """What each assistant turn of a side weighs: 0 outside the segment, in it 1, or what `turn_weights` says."""
    count = assistant_turns(getattr(example, side))
    given = example.columns.get(TURN_WEIGHTS)
    weights = [1.0] * count if given is None else [float(weight) for weight in given[side]]
    segment = set(segment_turns(example, side))
    return [weight if turn in segment else 0.0 for turn, weight in enumerate(weights)]


def check_segments(example: Example, name: str, value: Any) -> None:
    """`n` (the first n assistant turns of both answers) or `{"chosen": [turns], "rejected": [turns]}`, from 0, rising.

    Raises `Flaw` for other values and for turns that an answer does not have.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = {side: [value - 1] for side in TURN_SIDES}
    if not isinstance(value, dict) or value.keys() != set(TURN_SIDES):
        message = "the value is neither a number of turns nor lists of turns for `chosen` and `rejected`"
        raise Flaw("segment_bounds", message, name)
    for side, turns in value.items():
        count = assistant_turns(getattr(example, side))
        if not isinstance(turns, list) or not turns or not all(_is_turn(turn, count) for turn in turns):
            message = f"{shown(turns)} lies outside `{side}`, which has {count} assistant turns"
            raise Flaw("segment_bounds", message, name)
        if turns != sorted(set(turns)):
            raise Flaw("segment_bounds", f"the turns {shown(turns)} of `{side}` do not rise", name)


def _is_turn(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def check_turn_weights(example: Example, name: str, value: Any) -> None:
    """`{"chosen": [weights], "rejected": [weights]}`, one for each assistant turn of the answer. Raises `Flaw`."""
    if not isinstance(value, dict) or value.keys() != set(TURN_SIDES):
        raise Flaw("turn_weights", "the value is not lists of weights for `chosen` and `rejected`", name)
    for side, weights in value.items():
        count = assistant_turns(getattr(example, side))
        if not isinstance(weights, list) or len(weights) != count:
            message = f"{shown(weights)} is not {count} weights, one for each assistant turn of `{side}`"
            raise Flaw("turn_weights", message, name)
        if not all(_is_weight(weight) for weight in weights):
            raise Flaw("turn_weights", f"{shown(weights)} holds something else than numbers from 0 on", name)


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def check_turns(example: Example, *, unequal: bool = False) -> None:
    """Raise `Flaw` where the segments of a pair cannot be compared turn by turn.

    Both must hold equally many assistant turns (unless `unequal`), some turn of each must weigh more than 0, and the
    first turns must differ: what both sides share belongs to the prompt.
    """
    counts = {side: len(segment_turns(example, side)) for side in TURN_SIDES}
    if counts["chosen"] != counts["rejected"] and not unequal:
        message = f"{counts['chosen']} assistant turns count in `chosen` and {counts['rejected']} in `rejected`"
        raise Flaw("unequal_turns", message, SEGMENTS)
    for side in TURN_SIDES:
        if not any(turn_weights(example, side)):
            raise Flaw("turn_weights", f"no turn of `{side}` that is in the segment weighs more than 0", TURN_WEIGHTS)
    chosen, rejected = example.chosen, example.rejected
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0] == rejected[0]:
        raise Flaw("same_first_turn", "both answers begin with the same turn", "rejected")


# The same over tokens


def turn_of_tokens(scored: Flags) -> NDArray[np.int64]:
    """The turn of each scored token of an answer, counted from 0: `[scored tokens]`."""
    begins = scored.copy()
    begins[1:] &= ~scored[:-1]
    turns: NDArray[np.int64] = np.cumsum(begins)[scored] - 1
    return turns


def token_weights(scored: Flags, weights: list[float]) -> NDArray[np.float32]:
    """The weight of each token of an answer by that of its turn, 0 where the token is not scored: `[N]`."""
    spread = np.zeros(len(scored), dtype=np.float32)
    spread[scored] = np.asarray(weights, dtype=np.float32)[turn_of_tokens(scored)]
    return spread
