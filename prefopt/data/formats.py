"""From a raw row to an `Example`: one table of formats, every rule a row must keep, and the columns a loss declares.

The format is decided for each row from its column names; text or conversation is decided from its values. All rows of
a source must agree, so a file that mixes them is refused at the first row that differs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.data.judge import BOUNDS, BadBounds
from prefopt.data.messages import (
    Message,
    check_answer,
    check_messages,
    check_not_empty,
    check_text,
    split_messages,
    split_text,
)
from prefopt.data.options import label_of, template_kwargs_of, tools_of, unfinished_of
from prefopt.data.parting import Parted, cut, cut_notes, first_difference, given_bounds
from prefopt.data.problems import BadRow, Flaw, RawRow, Where, kind_of
from prefopt.data.turns import SEGMENTS
from prefopt.errors import DataError, nearest

Part = str | list[Message]


@dataclass(frozen=True)
class Format:
    """A way to write a row: its columns, and whether a row is a pair or one labelled answer."""

    name: str
    columns: tuple[str, ...]
    paired: bool

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns that hold answers."""
        return ("chosen", "rejected") if self.paired else ("completion",)

    @property
    def parts(self) -> tuple[str, ...]:
        """The columns that hold texts or messages."""
        return tuple(name for name in self.columns if name not in ("label", *BOUNDS))

    @property
    def bounded(self) -> bool:
        """Whether a row is two whole conversations, to be cut to the segment that its bounds name."""
        return BOUNDS[0] in self.columns


FORMATS = (
    Format("pairs", ("prompt", "chosen", "rejected"), paired=True),
    Format("pairs with the prompt inside the answers", ("chosen", "rejected"), paired=True),
    Format("labelled answers", ("prompt", "completion", "label"), paired=False),
    Format("whole conversations with the bounds of a segment", ("chosen", "rejected", *BOUNDS), paired=True),
    Format("conversations after a prompt with the bounds of a segment", ("prompt", "chosen", "rejected", *BOUNDS),
           paired=True),
)  # fmt: skip
NOWHERE = Where("rows", 0)
MISSPELT = 0.85  # similarity above which an unknown column is taken for a misspelt one; `prompt_id` is below


@dataclass(frozen=True)
class Example:
    """One pair (`chosen`, `rejected`) or one labelled answer (`completion`, `desirable`) to `prompt`.

    All parts are texts, or all are lists of messages. `unfinished` names the answers that were cut off and are read
    without an end marker. `example_id` depends on these parts, `unfinished`, `tools` and `chat_template_kwargs`, and on
    nothing else; `columns` holds every other column of the row as it was read. `notes` are for the report of the data.
    """

    example_id: str
    prompt: Part
    chosen: Part | None = None
    rejected: Part | None = None
    completion: Part | None = None
    desirable: bool | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    where: Where = NOWHERE
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def paired(self) -> bool:
        """Whether this is a pair."""
        return self.completion is None

    @property
    def kind(self) -> str:
        """How the parts are written: `text` or `chat`."""
        return "text" if isinstance(self.prompt, str) else "chat"

    @property
    def beside_messages(self) -> dict[str, Any]:
        """What a chat template reads beside the messages: `tools` and `chat_template_kwargs`, where there are any."""
        said = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs or None}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def answers(self) -> list[Part]:
        """Chosen and rejected, or the completion."""
        return [part for part in (self.chosen, self.rejected, self.completion) if part is not None]


def make_example(prompt: Part, *, where: Where, columns: dict[str, Any], **parts: Any) -> Example:
    """An example with its id: 16 hex digits of SHA-256 over the parts as canonical JSON, absent parts left out."""
    said = {"prompt": prompt, **{name: value for name, value in parts.items() if value not in (None, {}, ())}}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    example_id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Example(example_id, prompt, where=where, columns=columns, **parts)


def unpair(example: Example) -> tuple[Example, Example]:
    """A pair as two labelled answers, desirable first, each with the row's columns."""
    shared = {"tools": example.tools, "chat_template_kwargs": example.chat_template_kwargs}
    good, bad = (
        make_example(example.prompt, completion=getattr(example, side), desirable=desirable, where=example.where,
                     unfinished=("completion",) if side in example.unfinished else (),
                     columns=dict(example.columns), **shared)
        for side, desirable in (("chosen", True), ("rejected", False))
    )  # fmt: skip
    return good, bad


class RowParser:
    """Turns the rows of one source into examples. The first good row says how the source is written."""

    def __init__(self) -> None:
        self._format: Format | None = None
        self._first: Example | None = None

    def parse(self, row: RawRow) -> Example:
        """The row's example. Raises `BadRow` when the row breaks a rule, `DataError` when the source mixes kinds."""
        try:
            format = find_format(row.values, self._format)
            example = parse_row(row.values, format, row.where)
        except Flaw as flaw:
            raise BadRow(flaw.at(row.where)) from None
        if self._format is None or self._first is None:
            self._format, self._first = format, example
        self._check_same(example, self._first, format, self._format)
        return example

    def _check_same(self, example: Example, first: Example, format: Format, first_format: Format) -> None:
        if format is not first_format:
            message = f"this row is written as {format.name}, {first.where} as {first_format.name}"
        elif example.kind != first.kind:
            names = {"text": "text", "chat": "messages"}
            message = f"this row is {names[example.kind]}, {first.where} is {names[first.kind]}"
        else:
            return
        problem = Flaw("mixed_kinds", message, first_format.answers[0]).at(example.where)
        raise DataError(f"{problem} Split the file, and name the parts as entries of a mixture.")


# Which format


def find_format(values: dict[str, Any], expected: Format | None = None) -> Format:
    """The format, of those whose columns the row has, with most columns. Raises `Flaw` for a missing or misspelt one.

    With `expected`, a row that lacks one of its columns is refused for that, even where a shorter format would fit.
    """
    fitting = [format for format in FORMATS if set(format.columns) <= values.keys()]
    if not fitting:
        raise _missing(values, expected or _closest_format(values))
    format = max(fitting, key=lambda format: len(format.columns))
    if format.paired and len(values.keys() & set(BOUNDS)) == 1:
        raise _missing(values, next(format for format in FORMATS if format.bounded))
    if format.paired and all(_misspelt(name, values) for name in BOUNDS):
        refuse_misspelt(values, BOUNDS[0])
    if expected and set(format.columns) < set(expected.columns):
        raise _missing(values, expected)
    if "prompt" not in format.columns:
        refuse_misspelt(values, "prompt")
    return format


def _closest_format(values: dict[str, Any]) -> Format:
    def likeness(format: Format) -> int:
        return sum(2 if name in values else 1 if _misspelt(name, values) else 0 for name in format.columns)

    return max(FORMATS, key=likeness)


def _missing(values: dict[str, Any], format: Format) -> Flaw:
    column = next(name for name in format.columns if name not in values)
    refuse_misspelt(values, column)
    present = ", ".join(f"`{name}`" for name in values) or "none"
    message = f"the column is missing from {format.name}; the row has {present}.{nearest(column, values)}"
    return Flaw("missing_column", message, column)


def refuse_misspelt(values: dict[str, Any], column: str) -> None:
    """Raise `Flaw` for an unknown column that is nearly this one."""
    if found := _misspelt(column, values):
        raise Flaw("misspelt_column", f"the column is not known. Did you mean `{column}`?", found)


def _misspelt(column: str, values: Iterable[str]) -> str | None:
    """An unknown column of the row that is nearly `column`."""
    known = {name for format in FORMATS for name in format.columns}
    unknown = {name.strip().lower(): name for name in values if name not in known}
    close = difflib.get_close_matches(column, unknown, n=1, cutoff=MISSPELT)
    return unknown[close[0]] if close else None


# What a row says


def parse_row(values: dict[str, Any], format: Format, where: Where) -> Example:
    """The example that the row's values make in this format. Raises `Flaw` at the first broken rule."""
    parts = {name: _part(name, values[name]) for name in format.parts}
    notes: tuple[str, ...] = ()
    _check_one_kind(parts)
    if format.paired and parts["chosen"] == parts["rejected"]:
        raise Flaw("identical_pair", "it is the same as `chosen`", "rejected")
    if format.bounded:
        parts, values, notes = _to_bounds(parts, values)
    elif "prompt" not in parts:
        parts = _with_prompt(parts)
    prompt = parts["prompt"]
    for name in format.answers:
        answer = parts[name]
        if isinstance(answer, list) and isinstance(prompt, list):
            check_answer(name, answer, prompt)
    chat = isinstance(prompt, list)
    said: dict[str, Any] = {name: parts[name] for name in format.answers}
    if not format.paired:
        said["desirable"] = label_of(values["label"])
    said["tools"] = tools_of(values.get("tools"), chat)
    said["chat_template_kwargs"] = template_kwargs_of(values.get("chat_template_kwargs"), chat)
    said["unfinished"] = unfinished_of(values.get("unfinished"), format.answers)
    used = {*format.columns, "tools", "chat_template_kwargs", "unfinished"}
    columns = {name: value for name, value in values.items() if name not in used}
    return replace(make_example(prompt, where=where, columns=columns, **said), notes=notes)


def _part(column: str, value: Any) -> Part:
    if value is None:
        kind = "null_prompt" if column == "prompt" else "null_answer"
        raise Flaw(kind, "the value is null", column)
    if isinstance(value, list):
        return check_messages(column, value)
    if not isinstance(value, str):
        raise Flaw("wrong_type", f"the value is {kind_of(value)}, neither text nor messages", column)
    check_text(column, value)
    if column != "prompt":
        check_not_empty(column, value)
    return value


def _check_one_kind(parts: dict[str, Part]) -> None:
    texts = [name for name, part in parts.items() if isinstance(part, str)]
    lists = [name for name in parts if name not in texts]
    if texts and lists:
        message = f"the column is text while `{lists[0]}` is messages"
        if texts == ["prompt"]:
            message += "; if the messages hold the prompt too, leave this column out with `columns:`"
        raise Flaw("mixed_kinds", message, texts[0])


def _with_prompt(parts: dict[str, Part]) -> dict[str, Part]:
    chosen, rejected = parts["chosen"], parts["rejected"]
    split: Sequence[Part]
    if isinstance(chosen, str) and isinstance(rejected, str):
        split = split_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        split = split_messages(chosen, rejected)
    return dict(zip(("prompt", "chosen", "rejected"), split, strict=True))


def _to_bounds(
    parts: dict[str, Part], values: dict[str, Any]
) -> tuple[dict[str, Part], dict[str, Any], tuple[str, ...]]:
    """Two whole conversations as a pair cut to its bounds, the values of the row with its segments, and notes."""
    texts = [name for name, part in parts.items() if isinstance(part, str)]
    if texts:
        raise Flaw("wrong_type", f"the value is text; {' and '.join(BOUNDS)} count messages", texts[0])
    if values.get(SEGMENTS) is not None:
        raise Flaw("no_segment", f"the row has {' and '.join(BOUNDS)} as well", SEGMENTS)
    history = parts.pop("prompt", [])
    chosen, rejected = ([*history, *parts[side]] for side in ("chosen", "rejected"))
    try:
        pair = Parted(chosen, rejected, first_difference(chosen, rejected), values)
        bounds = given_bounds(pair)
        row = cut(pair, *bounds)
    except BadBounds as reason:
        raise Flaw("no_segment", str(reason), reason.column) from None
    notes = cut_notes(pair, *bounds, row)
    return {name: row.pop(name) for name in ("prompt", "chosen", "rejected")}, {**values, **row}, notes
