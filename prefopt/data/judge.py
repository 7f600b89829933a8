"""Bounds of a segment: the rules they must keep, and how they are read from the answer of a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from prefopt.data.messages import Message
from prefopt.data.problems import shown

BOUNDS = ("start_message", "end_message")
"""Columns with the first and the last message of the segment, counted from 0 in the chosen conversation."""

_NAMES = (BOUNDS, ("start", "end"))  # the names a judge may use for the two


class BadBounds(Exception):
    """No segment can be made of a pair. `kind` is the reason in a word, as reports count it, `column` where it lies."""

    def __init__(self, kind: str, message: str, column: str = "rejected") -> None:
        super().__init__(message)
        self.kind, self.column = kind, column


def check_bounds(first: Any, last: Any, messages: Sequence[Message], start: int) -> tuple[int, int]:
    """The two bounds, as they are: messages of the assistant, not before `start`, in order and inside the conversation.

    Raises `BadBounds` with what is wrong.
    """
    for column, place in zip(BOUNDS, (first, last), strict=True):
        name = column.removesuffix("_message")
        if not isinstance(place, int) or isinstance(place, bool):
            raise BadBounds("bad_bounds", f"the {name} {shown(place)} is not a whole number", column)
        if not 0 <= place < len(messages):
            raise BadBounds("bad_bounds", f"the {name} {place} lies outside the {len(messages)} messages", column)
        if messages[place]["role"] != "assistant":
            raise BadBounds("bad_bounds", f"the {name} {place} is a message of the {messages[place]['role']}", column)
    if first < start:
        raise BadBounds("bad_bounds", f"the start {first} lies before message {start}, where the two part", BOUNDS[0])
    if last < first:
        raise BadBounds("bad_bounds", f"the end {last} lies before the start {first}", BOUNDS[1])
    return first, last


def parse_bounds(answer: str, messages: Sequence[Message], start: int) -> tuple[int, int]:
    """The bounds that a judge's answer names: a JSON object with `start` and `end` (or `start_message` and
    `end_message`), whole numbers that count the messages of the chosen conversation from 0.

    Words and code fences around the object are passed over. Raises `BadBounds` where there is no such object, where
    two of them differ, and for bounds that `check_bounds` refuses.
    """
    found = [bounds for value in _objects(answer) if (bounds := _bounds(value)) is not None]
    if not found:
        raise BadBounds("unreadable_answer", f"no object with `start` and `end` in {shown(answer)}")
    if any(bounds != found[0] for bounds in found):
        raise BadBounds("unreadable_answer", f"the answer names several segments: {shown(found)}")
    return check_bounds(*found[0], messages, start)


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, those inside others left out."""
    decoder, found, position = json.JSONDecoder(), [], 0
    for opening in re.finditer(r"\{", text):
        if opening.start() < position:
            continue
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        found.append(value)
    return found


def _bounds(value: dict[str, Any]) -> tuple[Any, Any] | None:
    names = next((names for names in _NAMES if set(names) <= value.keys()), None)
    return None if names is None else (value[names[0]], value[names[1]])
