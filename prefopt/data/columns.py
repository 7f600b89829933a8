"""Checks of rows that are whole: the columns a loss declares, and what deserves a note without being wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from prefopt.data.answers import TARGET
from prefopt.data.formats import Example, Part
from prefopt.data.messages import check_answer, check_messages, check_not_empty, check_text, contents
from prefopt.data.problems import Flaw, Problem, kind_of, shown
from prefopt.data.turns import SEGMENT_COLUMNS, SEGMENTS, TURN_WEIGHTS, check_segments, check_turn_weights
from prefopt.errors import DataError, nearest


def check_columns(examples: Iterable[Example], required: Sequence[str], optional: Sequence[str] = ()) -> list[Problem]:
    """Everything wrong with the columns a loss declares; empty when all is well.

    A required column is there, and good, in every row. An optional one (null counts as absent) is there in every row
    or in none: a column in some rows only would change its meaning from batch to batch.
    """
    problems: list[Problem] = []
    first_place: dict[str, tuple[bool, Example]] = {}
    for example in examples:
        try:
            check_row_columns(example, required, optional)
        except Flaw as flaw:
            problems.append(flaw.at(example.where))
        for name in optional:
            present = example.columns.get(name) is not None
            before, first = first_place.setdefault(name, (present, example))
            if present is not before:
                lacking, having = (first, example) if present else (example, first)
                message = f"the column is missing here, while {having.where} has it"
                problems.append(Flaw("missing_column", message, name).at(lacking.where))
    return problems


def check_row_columns(
    example: Example, required: Sequence[str], optional: Sequence[str] = (), *, needed_by: str = "loss"
) -> None:
    """Raise `Flaw` for the first declared column that is missing, or whose value cannot be used."""
    for name in required:
        if name not in example.columns:
            present = ", ".join(f"`{column}`" for column in example.columns) or "none"
            hint = nearest(name, example.columns)
            message = f"the {needed_by} needs this column; the row has, beside prompt and answers, {present}.{hint}"
            raise Flaw("missing_column", message, name)
    for name in (*required, *optional):
        if name in required or example.columns.get(name) is not None:
            COLUMN_CHECKS.get(name, _check_number)(example, name, example.columns[name])


def refuse_rows(
    examples: Iterable[Example], declared: Sequence[str], row_problem: Callable[[Mapping[str, float]], str]
) -> None:
    """`DataError` for the first row whose numbers, of the declared columns, a loss objects to."""
    numbers = [name for name in declared if name not in (TARGET, *SEGMENT_COLUMNS)]
    for example in examples:
        present = {name: example.columns[name] for name in numbers if example.columns.get(name) is not None}
        if problem := row_problem(present):
            raise DataError(f"{example.where}: {problem}")


def _check_number(example: Example, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Flaw("not_a_number", f"the value is {shown(value)}, not a number", name)
    if not math.isfinite(value):
        raise Flaw("not_finite", f"the value is {value}", name)


def _check_between(low: float, high: float) -> Callable[[Example, str, Any], None]:
    def check(example: Example, name: str, value: Any) -> None:
        _check_number(example, name, value)
        if not low <= value <= high:
            bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
            raise Flaw("out_of_range", f"the value is {value}, but must be {bounds}", name)

    return check


def _check_target(example: Example, name: str, value: Any) -> None:
    target_of(example)


def target_of(example: Example) -> Part:
    """The target of a row, an answer to its prompt like `chosen` and of the same kind. Raises `Flaw` for others."""
    value = example.columns[TARGET]
    if isinstance(value, str) and isinstance(example.prompt, str):
        check_text(TARGET, value)
        check_not_empty(TARGET, value)
        return value
    if isinstance(value, list) and isinstance(example.prompt, list):
        messages = check_messages(TARGET, value)
        check_answer(TARGET, messages, example.prompt)
        return messages
    kind = {"text": "text", "chat": "messages"}[example.kind]
    raise Flaw("wrong_type", f"the value is {kind_of(value)}; the row's answers are {kind}", TARGET)


COLUMN_CHECKS: dict[str, Callable[[Example, str, Any], None]] = {
    "preference": _check_between(0.0, 1.0),
    "weight": _check_between(0.0, math.inf),
    TARGET: _check_target,
    SEGMENTS: check_segments,
    TURN_WEIGHTS: check_turn_weights,
}


def marker_pattern(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of a tokenizer's special tokens; None when there are none."""
    tokens = sorted({token for token in special_tokens if token.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def notes_of(example: Example, markers: re.Pattern[str] | None = None) -> list[str]:
    """What deserves a look: `prompt_repeated`, `empty_prompt`, `control_markers` (special tokens inside the text), and
    what was noted when the row was read."""
    notes = [*example.notes]
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"] or ""
    if not prompt.strip():
        notes.append("empty_prompt")
    elif any(_first_text(answer).startswith(prompt) for answer in example.answers):
        notes.append("prompt_repeated")
    if markers and any(markers.search(text) for part in (example.prompt, *example.answers) for text in contents(part)):
        notes.append("control_markers")
    return notes


def _first_text(answer: Part) -> str:
    return next(iter(contents(answer)), "")
