"""Strict JSON: rows of JSON Lines files and of JSON lists, with the line each one stands on.

Stricter than Python's `json`: a key may stand once in an object, NaN and infinity are refused, half characters too.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from prefopt.data.problems import BadRow, Flaw, Problem, RawRow, Rows, Where, kind_of
from prefopt.errors import DataError

MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64

WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path, source: str) -> Rows:
    """A `.json` file: one list of objects, or one object per line."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_list(path, source) if start.startswith(b"[") else read_json_lines(path, source)


def read_json_lines(path: Path, source: str) -> Rows:
    """One strict JSON object per line; blank lines are passed over."""
    with path.open("rb") as file:
        refuse_wide(file, source)
        row = 0
        for number, line in enumerate(_lines(file), start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield _json_row(text, Where(source, row, number))
                row += 1


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines without their ends. Of one that is too long only the first part, enough to see that it is."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        yield line.rstrip(b"\r\n")


def _json_row(line: bytes, where: Where) -> RawRow | Problem:
    try:
        return RawRow(where, _checked_object(parse_json(_decoded(line))))
    except Flaw as flaw:
        return flaw.at(where)


def parse_json(text: str) -> Any:
    """The value of one JSON text. Raises `Flaw` with what is wrong and at which character."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_flaw(text, error) from None


def read_json_list(path: Path, source: str) -> Rows:
    """One list of objects. A list is one value, so broken JSON ends the reading; a bad element does not."""
    with path.open("rb") as file:
        refuse_wide(file, source)
        content = file.read().removeprefix(codecs.BOM_UTF8)
    row, line, position = 0, 1, 0
    try:
        text = _decoded(content, limit=False)
        elements = _elements(text)
        for start, end, value in elements:
            line, position = line + text.count("\n", position, start), start
            where = Where(source, row, line)
            yield _element_row(value, end - start, where)
            row += 1
    except Flaw as flaw:
        raise BadRow(flaw.at(Where(source, row, line))) from None


def _elements(text: str) -> Iterator[tuple[int, int, Any]]:
    """Start, end and value of each element of the list in `text`."""
    position, separator = text.index("["), ","
    while separator == ",":
        start = _skip_blanks(text, position + 1)
        if text[start : start + 1] == "]" and text[position] == "[":
            separator, position = "]", start
            break
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise _json_flaw(text, error) from None
        yield start, end, value
        position = _skip_blanks(text, end)
        separator = text[position : position + 1]
    if separator != "]":
        kind = "bad_json" if separator else "cut_off_line"
        raise Flaw(kind, f"the list is not closed: a comma or `]` belongs at character {position}")
    if text[position + 1 :].strip():
        raise Flaw("bad_json", "there is more text after the end of the list")


def _element_row(value: Any, length: int, where: Where) -> RawRow | Problem:
    try:
        if length > MAX_LINE_BYTES:
            raise _too_long()
        return RawRow(where, _checked_object(value))
    except Flaw as flaw:
        return flaw.at(where)


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Flaw("duplicate_key", f"the key `{twice}` stands twice in one object", twice)
    return values


# Non-finite words become floats here and are refused by `_checked_object`, which knows the column.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=float)


def _json_flaw(text: str, error: Exception) -> Flaw:
    """What is wrong with JSON that does not parse, told from the place where the parser stopped."""
    if isinstance(error, RecursionError):
        return Flaw("bad_json", f"values are nested more than {MAX_DEPTH} deep")
    if not isinstance(error, json.JSONDecodeError):
        return Flaw("bad_json", "a number has too many digits")
    place = f"at character {error.pos + 1}"
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if error.msg.startswith("Invalid control character"):
        return Flaw("control_character", f"an unescaped control character stands in a text {place}")
    if after.startswith(",") or (before.endswith(",") and after[:1] in ("}", "]")):
        return Flaw("stray_comma", f"there is a comma too many {place}")
    if error.msg.startswith("Unterminated string") or not after or not text.rstrip().endswith(("}", "]")):
        return Flaw("cut_off_line", f"the JSON breaks off: {_sentence(error)} {place}")
    if error.msg == "Extra data" and after.startswith("{"):
        return Flaw("two_objects", f"a second object begins {place}")
    return Flaw("bad_json", f"this is not JSON: {_sentence(error)} {place}")


def _sentence(error: json.JSONDecodeError) -> str:
    return error.msg[0].lower() + error.msg[1:].removesuffix(" at").removesuffix(" starting")


def _checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Flaw("not_an_object", f"the row is {kind_of(value)}, not an object")
    for column, cell in value.items():
        check_value(column, cell)
    return value


def check_value(column: str, cell: Any) -> None:
    """Refuse what JSON cannot say (NaN, infinity), what UTF-8 cannot (half characters), and bottomless nesting."""
    stack = [(cell, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str) and SURROGATE.search(value):
            raise Flaw("lone_surrogate", "the text holds one half of a surrogate pair", column)
        if isinstance(value, float) and not math.isfinite(value):
            raise Flaw("not_finite", f"{value} is not a number in JSON", column)
        if depth > MAX_DEPTH:
            raise Flaw("bad_json", f"values are nested more than {MAX_DEPTH} deep", column)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        stack.extend((item, depth + 1) for item in inner)


def refuse_wide(file: IO[bytes], source: str) -> None:
    """A file of two or four bytes a character has no UTF-8 row to save; say how to convert it."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(WIDE_MARKS) or b"\0" in start:
        raise DataError(
            f"{source}: the file is UTF-16 or UTF-32, not UTF-8 (encoding). Convert it: "
            f"iconv -f UTF-16 -t UTF-8 {source} > converted{Path(source).suffix}"
        )


def _decoded(line: bytes, limit: bool = True) -> str:
    if limit and len(line) > MAX_LINE_BYTES:
        raise _too_long()
    if b"\0" in line:
        raise Flaw("encoding", "the line holds NUL bytes, as UTF-16 text does")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Flaw("encoding", f"byte {error.start + 1} of the line is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise Flaw("encoding", "a byte-order mark stands inside the file")
    return text


def _too_long() -> Flaw:
    return Flaw("line_too_long", f"the row is longer than {MAX_LINE_BYTES:,} bytes")
