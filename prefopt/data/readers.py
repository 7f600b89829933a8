"""File formats: every reader turns its source into raw rows with their places, and into problems where it cannot.

A reader yields `RawRow` or `Problem` for each row and goes on; what spoils the whole source (a cut-off Parquet file, a
UTF-16 file, a JSON list that breaks off) is raised as a `DataError`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.data import json_rows
from prefopt.data.json_rows import SURROGATE, check_value, parse_json, read_json, read_json_lines, refuse_wide
from prefopt.data.problems import ADVICE, Flaw, Problem, RawRow, Rows, Where, kind_of
from prefopt.errors import DataError, nearest

ARROW_BATCH = 512
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "target")

_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"": None, "true": True, "false": False, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_file(path: Path, source: str, column_names: Mapping[str, str] | None = None) -> Rows:
    """Rows of a local file, by its suffix. `source` is its name in messages; `column_names` maps ours to theirs."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{source}: files ending in `{path.suffix}` are not read.{nearest(suffix, READERS)} "
            f"Convert it to one of {', '.join(READERS)}."
        )
    rows = rename_columns(READERS[suffix](path, source), column_names or {})
    return transform(rows, _typed) if suffix in (".csv", ".tsv") else rows


def transform(rows: Iterable[RawRow | Problem], change: Callable[[dict[str, Any]], dict[str, Any]]) -> Rows:
    """The rows with `change` made to their values; a `Flaw` it raises becomes the row's problem."""
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield RawRow(row.where, change(row.values))
        except Flaw as flaw:
            yield flaw.at(row.where)


def rename_columns(rows: Rows, column_names: Mapping[str, str]) -> Rows:
    """The rows under our column names, `{ours: theirs}`; all other columns keep their names."""
    theirs = {their: our for our, their in column_names.items()}
    return transform(rows, lambda values: _renamed(values, theirs)) if theirs else rows


def _renamed(values: dict[str, Any], theirs: Mapping[str, str]) -> dict[str, Any]:
    for their, our in theirs.items():
        if their not in values:
            message = f"`column_names` takes `{our}` from `{their}`, which is not there.{nearest(their, values)}"
            raise Flaw("missing_column", message, their)
        if our in values and our not in theirs:
            raise Flaw("column_clash", f"`column_names` takes `{our}` from `{their}`, but `{our}` is there too", our)
    return {theirs.get(name, name): value for name, value in values.items()}


# CSV and TSV


def read_csv(path: Path, source: str, separator: str = ",") -> Rows:
    """Comma-separated rows under a header. Cells stay text; `_typed` reads them once columns have our names."""
    csv.field_size_limit(json_rows.MAX_LINE_BYTES)
    with path.open("rb") as raw:
        refuse_wide(raw, source)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, delimiter=separator, strict=True)
        yield from _csv_rows(table, _csv_header(table, source), source)


def read_tsv(path: Path, source: str) -> Rows:
    """Tab-separated rows under a header."""
    return read_csv(path, source, separator="\t")


def _csv_header(table: Any, source: str) -> list[str]:
    try:
        header: list[str] = next(table, [])
    except csv.Error as error:
        raise DataError(f"{source}:1: the header cannot be split into cells: {error}. {ADVICE['bad_csv']}") from None
    if len(set(header)) < len(header):
        raise DataError(f"{source}:1: two columns have the same name in the header. Rename one of them.")
    if SURROGATE.search("".join(header)):
        raise DataError(f"{source}:1: the header is not UTF-8 (encoding). {ADVICE['encoding']}")
    return header


def _csv_rows(table: Any, header: list[str], source: str) -> Rows:
    row = 0
    while True:
        where = Where(source, row, table.line_num + 1)
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield Flaw("bad_csv", f"the row cannot be split into cells: {error}").at(where)
        else:
            if not cells:
                continue
            yield _csv_row(cells, header, where)
        row += 1


def _csv_row(cells: list[str], header: list[str], where: Where) -> RawRow | Problem:
    if len(cells) != len(header):
        message = f"the row has {len(cells)} cells, the header {len(header)}"
        return Flaw("cell_count", message).at(where)
    for column, cell in zip(header, cells, strict=True):
        if SURROGATE.search(cell):
            return Flaw("encoding", "the cell holds bytes that are not UTF-8", column).at(where)
    return RawRow(where, dict(zip(header, cells, strict=True)))


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """CSV has no types: lists of messages, and in other columns numbers, booleans and JSON, are told by their look."""
    return {
        name: _text_or_messages(name, cell) if name in TEXT_COLUMNS else _typed_cell(cell)
        for name, cell in values.items()
    }


def _text_or_messages(column: str, cell: str) -> Any:
    if not re.match(r"\s*\[\s*(\{|\]\s*$)", cell):
        return cell
    try:
        value = parse_json(cell)
    except Flaw as flaw:
        message = f"the cell begins like a list of messages, but {flaw.message}"
        raise Flaw(flaw.kind, message, column) from None
    check_value(column, value)
    return value


def _typed_cell(cell: str) -> Any:
    text = cell.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if not _JSON_NUMBER.fullmatch(text) and text[0] not in "[{":
        return cell
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return cell


# Arrow


def read_parquet(path: Path, source: str) -> Rows:
    """Rows of a Parquet file, a batch at a time."""
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{source}: two columns have the same name. Rename one of them.")
            for batch in file.iter_batches(batch_size=ARROW_BATCH):
                for values in _batch_rows(batch):
                    yield _arrow_row(values, Where(source, row))
                    row += 1
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{source}: not a whole Parquet file (after row {row}): {reason}. Write it again.") from None


def _batch_rows(batch: Any) -> list[Any]:
    """The batch's rows; where a text is not UTF-8, which spoils the whole batch, the error stands for its row."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]
    return rows


def _arrow_row(values: dict[str, Any] | UnicodeDecodeError, where: Where) -> RawRow | Problem:
    if isinstance(values, UnicodeDecodeError):
        return Flaw("encoding", f"a text is not UTF-8: {values.reason}").at(where)
    return RawRow(where, {name: _without_nulls(value) for name, value in values.items()})


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message every key of any message; the keys it filled with null were never written."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# Memory


def read_memory(rows: Iterable[Any], source: str) -> Rows:
    """Rows of a list, or of a `datasets.Dataset` (whose nested nulls are Arrow's, see above)."""
    from_arrow = hasattr(rows, "with_format")
    plain: Iterable[Any] = rows.with_format(None) if hasattr(rows, "with_format") else rows
    for row, values in enumerate(plain):
        where = Where(source, row)
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            message = f"the row is {kind_of(values)}, not a mapping from column names"
            yield Flaw("not_an_object", message).at(where)
            continue
        yield RawRow(where, {name: _without_nulls(v) if from_arrow else v for name, v in values.items()})


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
