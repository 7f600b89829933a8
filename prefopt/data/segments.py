"""Files of whole conversations, two by two -> pairs of segments: where each ends, and what was left out.

A selector says which turns of the better conversation decided it. It may be a rule of this file, columns of the row, or
a callable of the user's, which may ask a language model; nothing here does.
"""

from __future__ import annotations

import json
import runpy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.data.judge import BOUNDS, BadBounds, check_bounds, parse_bounds
from prefopt.data.messages import check_messages
from prefopt.data.opening import open_source
from prefopt.data.parting import Parted, Session, cut, first_difference, given_bounds
from prefopt.data.problems import BadRow, Flaw, Problem, RawRow, Tally, kind_of
from prefopt.data.spec import DataSpec
from prefopt.errors import DataError, UserError

RULES = "single_turn, fixed:N, to_end, given, judged:COLUMN or FILE.py:FUNCTION"

Selector = Callable[[Parted], tuple[int, int]]
"""First and last message of the segment in the chosen conversation, both of the assistant; raises `BadBounds` to drop
the pair."""


# Selectors


def selector_of(name: str) -> Selector:
    """The selector of a name: `single_turn`, `fixed:N` (N turns of the assistant), `to_end`, `given` (the columns
    `start_message` and `end_message`), `judged:COLUMN` (a judge's answer, see `parse_bounds`), or `FILE.py:FUNCTION`.

    Raises `UserError` for any other name.
    """
    rule, _, argument = name.rpartition(":")
    if rule.endswith(".py"):
        return _from_file(Path(rule), argument)
    if rule == "fixed" and argument.isdecimal() and int(argument):
        return partial(_fixed, turns=int(argument))
    if rule == "judged" and argument:
        return partial(_judged, column=argument)
    rules: dict[str, Selector] = {
        "single_turn": partial(_fixed, turns=1),
        "to_end": partial(_fixed, turns=None),
        "given": given_bounds,
    }
    if name not in rules:
        raise UserError(f"--select {name}: write {RULES}")
    return rules[name]


def _fixed(pair: Parted, turns: int | None) -> tuple[int, int]:
    places = [
        place for place, message in enumerate(pair.chosen) if message["role"] == "assistant" and place >= pair.start
    ]
    return pair.start, places[:turns][-1]


def _judged(pair: Parted, column: str) -> tuple[int, int]:
    answer = pair.row.get(column)
    if not isinstance(answer, str):
        raise BadBounds("no_answer", f"`{column}` is {kind_of(answer)}, not the text of a judge's answer")
    return parse_bounds(answer, pair.chosen, pair.start)


def _from_file(file: Path, function: str) -> Selector:
    try:
        found = runpy.run_path(str(file))
    except OSError as error:
        raise UserError(f"--select: {file} cannot be read: {error.strerror}") from error
    if not callable(found.get(function)):
        raise UserError(f"--select: {file} has no function `{function}`")
    chosen: Selector = found[function]
    return chosen


# Whole files


@dataclass
class SegmentReport:
    """What became of the pairs of conversations.

    `turns` counts segments by their number of assistant turns, `cut_messages` kept pairs by the messages that were cut
    from the end of both sides, `dropped` pairs by reason.
    """

    pairs: int = 0
    bad_rows: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    cut_messages: Counter[int] = field(default_factory=Counter)
    dropped: dict[str, Tally] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        lines = [f"{self.turns.total()} of {self.pairs} pairs made, {self.bad_rows} bad rows"]
        for title, counts in (("assistant turns in a segment", self.turns), ("messages cut away", self.cut_messages)):
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{size}: {count}" for size, count in sorted(counts.items())))
        return lines + [f"left out, {reason}: {tally}" for reason, tally in sorted(self.dropped.items())]


def build_segments(
    source: DataSpec, select: Selector, *, on_bad_row: str = "error"
) -> tuple[list[dict[str, Any]], SegmentReport]:
    """Rows for `segment_dpo` from rows that hold two whole conversations, `chosen` and `rejected`, and a report.

    A `prompt` column is put before both. Other columns are kept, the bounds left out. What a selector refuses is
    dropped and counted. Raises `DataError` for the first row that is no pair of conversations, unless `on_bad_row` is
    "skip", and when no pair is left.
    """
    report, built = SegmentReport(), []
    for _, rows in open_source(source):
        for row in rows:
            try:
                values, chosen, rejected = _read(row)
            except BadRow:
                if on_bad_row != "skip":
                    raise
                report.bad_rows += 1
                continue
            report.pairs += 1
            try:
                pair = Parted(chosen, rejected, first_difference(chosen, rejected), values)
                built.append(_build(pair, select, report))
            except BadBounds as reason:
                report.dropped.setdefault(reason.kind, Tally()).add(f"{row.where}: {reason}")
    if not built:
        raise DataError("\n".join(["no pair is left:", *report.lines()]))
    return built, report


def _read(row: RawRow | Problem) -> tuple[Mapping[str, Any], Session, Session]:
    """The columns of a row and its two conversations, whole."""
    if isinstance(row, Problem):
        raise BadRow(row)
    try:
        history = _messages(row.values, "prompt") if row.values.get("prompt") is not None else []
        chosen, rejected = ([*history, *_messages(row.values, side)] for side in ("chosen", "rejected"))
    except Flaw as flaw:
        raise BadRow(flaw.at(row.where)) from None
    return row.values, chosen, rejected


def _messages(values: Mapping[str, Any], column: str) -> Session:
    if column not in values:
        raise Flaw("missing_column", f"a pair of conversations needs `{column}`", column)
    if not isinstance(values[column], list):
        raise Flaw("wrong_type", f"the value is {kind_of(values[column])}, not a list of messages", column)
    return check_messages(column, values[column])


def _build(pair: Parted, select: Selector, report: SegmentReport) -> dict[str, Any]:
    bounds = select(pair)
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise UserError(f"--select: the function gave {bounds!r}; write two numbers, the first and the last message")
    row = cut(pair, *check_bounds(*bounds, pair.chosen, pair.start))
    whole, kept = len(pair.chosen) + len(pair.rejected), len(row["chosen"]) + len(row["rejected"])
    report.turns[len(row["segments"]["chosen"])] += 1
    report.cut_messages[whole - 2 * pair.start - kept] += 1
    return {**row, **{name: value for name, value in pair.row.items() if name not in (*row, *BOUNDS)}}


def as_json_lines(rows: list[dict[str, Any]]) -> str:
    """The rows as the text of a `.jsonl` file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
