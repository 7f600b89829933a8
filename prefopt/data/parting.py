"""Two whole conversations -> a pair of segments: where they part, and what is cut after the turns that decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.judge import BOUNDS, BadBounds, check_bounds
from prefopt.data.messages import Message

Session = list[Message]


@dataclass(frozen=True)
class Parted:
    """Two whole conversations, as the assistant had them, and `start`, the first message in which they differ.

    `row` holds all columns of the row, for selectors that read them.
    """

    chosen: Session
    rejected: Session
    start: int
    row: Mapping[str, Any] = field(default_factory=dict)


def first_difference(chosen: Session, rejected: Session) -> int:
    """Index of the first message that differs. Raises `BadBounds` unless both have an assistant's message there."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == min(len(chosen), len(rejected)):
        same = len(chosen) == len(rejected)
        raise BadBounds(
            "same" if same else "one_goes_on", "one conversation is the beginning of the other, or all of it"
        )
    if any(session[shared]["role"] != "assistant" for session in (chosen, rejected)):
        raise BadBounds("partner_differs", f"the two part at message {shared}, which is not the assistant's")
    if shared == 0:
        raise BadBounds("no_history", "the two differ from their first message on: there is nothing to answer")
    return shared


def given_bounds(pair: Parted) -> tuple[int, int]:
    """The bounds that the row itself names. Raises `BadBounds` where it names none, or wrong ones."""
    values = [pair.row.get(name) for name in BOUNDS]
    if any(value is None for value in values):
        lacking = BOUNDS[values.index(None)]
        raise BadBounds("no_bounds", f"the row has no {' and '.join(BOUNDS)}", lacking)
    return check_bounds(values[0], values[1], pair.chosen, pair.start)


def cut(pair: Parted, first: int, last: int) -> dict[str, Any]:
    """The pair as a row: `prompt`, `chosen`, `rejected`, and `segments` for the turns from message `first` to `last`.

    The rejected conversation is cut after as many turns of the assistant as the chosen one has up to `last`, and both
    after fewer where one of them has no more. A side of which something is cut is not `unfinished`, where the row says
    so. Raises `BadBounds` where nothing of the segment is left.
    """
    whole = {"chosen": pair.chosen[pair.start :], "rejected": pair.rejected[pair.start :]}
    skipped = _turns(pair.chosen[pair.start : first])
    count = min(_turns(pair.chosen[pair.start : last + 1]), *map(_turns, whole.values()))
    if count <= skipped:
        raise BadBounds("too_short", "the rejected conversation ends before the segment begins")
    turns = list(range(skipped, count))
    sides = {side: up_to_turn(messages, count) for side, messages in whole.items()}
    row = {"prompt": pair.chosen[: pair.start], **sides, "segments": {"chosen": turns, "rejected": turns}}
    unfinished = pair.row.get("unfinished")
    if isinstance(unfinished, list):
        row["unfinished"] = [name for name in unfinished if sides.get(name) == whole.get(name)]
    return row


def cut_notes(pair: Parted, first: int, last: int, row: dict[str, Any]) -> tuple[str, ...]:
    """What deserves a look in the `row` that `cut` made: `cut_to_bounds` where messages fell away, `segment_shortened`
    where the rejected conversation has fewer turns left than the segment."""
    lengths = {"chosen": len(pair.chosen), "rejected": len(pair.rejected)}
    shortened = len(row["segments"]["chosen"]) < _turns(pair.chosen[first : last + 1])
    found = {
        "cut_to_bounds": any(len(row["prompt"]) + len(row[side]) < length for side, length in lengths.items()),
        "segment_shortened": shortened,
    }
    return tuple(note for note, holds in found.items() if holds)


def up_to_turn(messages: Session, count: int) -> Session:
    """The messages up to the assistant's turn of this number, counted from 1, or all up to its last."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: places[:count][-1] + 1]


def _turns(messages: Session) -> int:
    return sum(message["role"] == "assistant" for message in messages)
