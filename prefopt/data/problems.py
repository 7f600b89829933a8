"""What can be wrong with a row: one table of kinds, each with its advice, and the report that counts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prefopt.errors import DataError

# The tokenizer's own kinds are not here: this table is what can be seen in the text alone.
ADVICE = {
    "cut_off_line": "Write the whole object on one line, or remove the line.",
    "stray_comma": "Remove the comma.",
    "two_objects": "Put each object on a line of its own.",
    "bad_json": "Write one JSON object per line, or one list of objects in a .json file.",
    "not_an_object": "Write an object with one key per column.",
    "duplicate_key": "Keep one of the two values.",
    "line_too_long": "Shorten or remove the row; a row this long is rarely what was meant.",
    "encoding": "Save the file as UTF-8.",
    "bad_csv": "Quote cells that hold commas, quotes or line breaks, and close every quote.",
    "cell_count": "Give every row as many cells as the header; quote cells that hold the separator.",
    "lone_surrogate": "Half of a character was lost: restore the text from its source, or remove the row.",
    "control_character": "Remove the character; it usually comes from a binary or damaged source.",
    "missing_column": "Add the column, or name the one that holds it with `column_names: {ours: yours}`.",
    "misspelt_column": "Rename the column, or map it with `column_names: {ours: yours}`.",
    "column_clash": "Remove one of the two columns, or the mapping.",
    "null_prompt": "Write the prompt (an empty text is allowed), or remove the row.",
    "null_answer": "Write the answer, or remove the row.",
    "empty_answer": "Write the answer, or remove the row.",
    "blank_answer": "Write the answer, or remove the row.",
    "wrong_type": "Write text, or a list of messages with `role` and `content`.",
    "mixed_kinds": "Write all parts of a row, and all rows of a file, in the same way.",
    "empty_messages": "Write at least one message, or remove the row.",
    "no_role": "Give every message a `role`: system, developer, user, assistant or tool.",
    "unknown_role": "Use one of the roles system, developer, user, assistant, tool.",
    "null_content": "Write the content as text; only an assistant message with `tool_calls` may leave it out.",
    "two_assistant_turns": "Join the two turns, or put the message that came between them back.",
    "completion_start": "Move the messages before the first assistant turn into the prompt.",
    "completion_end": "End the answer with an assistant turn.",
    "no_common_prompt": "Add a `prompt` column, or let both conversations start with the same messages.",
    "identical_pair": "A pair without a difference teaches nothing: remove the row.",
    "bad_label": "Write true (desirable) or false (undesirable).",
    "not_a_number": "Write a number.",
    "not_finite": "Write a finite number, or leave the column out of the file.",
    "out_of_range": "Write a number within the range.",
    "segment_bounds": "Count the assistant turns of the answer from 0 and stay below their number.",
    "turn_weights": "Write a number from 0 on for each assistant turn of each answer, or leave the column out.",
    "unequal_turns": "Cut the longer side (`prefopt segments build` does), name as many turns of both in `segments`, "
    "or write allow_unequal_segments: true.",
    "no_segment": "Both bounds are the assistant's messages of the chosen conversation, counted from 0, from where "
    "the two part on. Mend the row, or leave such rows out with `on_bad_row: skip`.",
    "same_first_turn": "Move what both answers share into the prompt, up to the turn where they part.",
    "bad_tools": "Write `tools` as a list of objects, or as the JSON text of one, beside messages.",
    "bad_unfinished": "Write the names of the answers that were cut off, such as [rejected], or leave the column out.",
    "bad_template_kwargs": "Write `chat_template_kwargs` as an object, beside messages.",
}

SHOWN_PLACES = 5


@dataclass(frozen=True, slots=True)
class Where:
    """A row's place: `row` counts from 0 in its source, `line` from 1 in its file (None where there are no lines)."""

    source: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}" if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one row: where, in which column (None when the row cannot be read), what, and what to do."""

    where: Where
    column: str | None
    kind: str
    message: str
    advice: str

    def __str__(self) -> str:
        column = f" column `{self.column}`:" if self.column else ""
        said = f"{self.where}:{column} {self.message.rstrip('.')} ({self.kind}). {self.advice}"
        return said.encode("utf-8", "backslashreplace").decode()  # a name with half characters must still print


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its source holds it, columns by name."""

    where: Where
    values: dict[str, Any]


Rows = Iterator[RawRow | Problem]


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON, with its article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A value as JSON, cut to a length that fits a message."""
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


class Flaw(Exception):
    """A problem found by code that does not know the row's place; `at` adds it."""

    def __init__(self, kind: str, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.column = kind, message, column

    def at(self, where: Where) -> Problem:
        """The same problem, placed."""
        return Problem(where, self.column, self.kind, self.message, ADVICE[self.kind])


class BadRow(DataError):
    """One row cannot be used; the others may be. `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass
class Tally:
    """How often something was seen, and the first few places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < SHOWN_PLACES:
            self.places.append(place)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count} ({'; '.join(self.places)}{more})"


@dataclass
class SourceCount:
    """Rows of one source: all that were read, those refused, and the examples handed on."""

    name: str
    rows: int = 0
    bad_rows: int = 0
    examples: int = 0


@dataclass
class DataReport:
    """What was read, refused and noticed. `problems` are rows left out, `notes` are rows kept that deserve a look."""

    sources: list[SourceCount] = field(default_factory=list)
    problems: dict[str, Tally] = field(default_factory=dict)
    notes: dict[str, Tally] = field(default_factory=dict)
    held_out: int = 0

    @property
    def bad_rows(self) -> int:
        """Rows left out because of a problem, over all sources."""
        return sum(source.bad_rows for source in self.sources)

    def add_problem(self, problem: Problem) -> None:
        """Count a row that is left out."""
        column = f" `{problem.column}`" if problem.column else ""
        self.problems.setdefault(problem.kind, Tally()).add(f"{problem.where}{column}")

    def add_note(self, kind: str, where: Where) -> None:
        """Count something worth knowing about a row that is kept."""
        self.notes.setdefault(kind, Tally()).add(str(where))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            "sources": [vars(source) for source in self.sources],
            "problems": {kind: vars(tally) for kind, tally in sorted(self.problems.items())},
            "notes": {kind: vars(tally) for kind, tally in sorted(self.notes.items())},
            "bad_rows": self.bad_rows,
            "held_out": self.held_out,
        }

    def lines(self) -> list[str]:
        """The report as lines of text, sources first."""
        lines = [
            f"{source.name}: {source.rows} rows, {source.bad_rows} bad, {source.examples} examples"
            for source in self.sources
        ]
        lines += [f"left out, {kind}: {tally}" for kind, tally in sorted(self.problems.items())]
        lines += [f"noticed, {kind}: {tally}" for kind, tally in sorted(self.notes.items())]
        return lines + ([f"held out for testing: {self.held_out} examples"] if self.held_out else [])
