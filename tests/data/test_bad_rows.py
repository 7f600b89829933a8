"""Every corruption a data file is known to suffer: refused by place, column and kind, or skipped and counted.

Kinds 17 and 22 of the catalogue need a tokenizer and are tested with it. `python -m tests.data.test_bad_rows` prints
the table of kinds and messages.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from prefopt.data import DataSpec, json_rows, load_examples
from prefopt.data.problems import ADVICE
from prefopt.errors import DataError, UserError

ROWS = 12
PLACES = (6, ROWS - 1)
Row = dict[str, Any]


def text_pair(index: int) -> Row:
    return {"prompt": f"Name fruit {index}.", "chosen": f" apple {index}", "rejected": f" stone {index}"}


def chat_pair(index: int) -> Row:
    row = text_pair(index)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


def labelled(index: int) -> Row:
    return {"prompt": f"Name fruit {index}.", "completion": f" apple {index}", "label": index % 2 == 0}


def with_margin(index: int) -> Row:
    return {**text_pair(index), "margin": 0.5}


def with_segments(index: int) -> Row:
    return {**chat_pair(index), "segments": {"chosen": [0], "rejected": [0]}}


def put(column: str, value: Any) -> Callable[[Row], Any]:
    return lambda row: {**row, column: value}


def message(column: str, **change: Any) -> Callable[[Row], Any]:
    """Change the fields of the column's first message; None removes the field."""

    def changed(row: Row) -> Any:
        first = {name: value for name, value in {**row[column][0], **change}.items() if value is not None}
        return {**row, column: [first, *row[column][1:]]}

    return changed


def rename(old: str, new: str) -> Callable[[Row], Any]:
    return lambda row: {(new if name == old else name): value for name, value in row.items()}


def same_answers(row: Row) -> Row:
    return {**row, "rejected": row["chosen"]}


@dataclass(frozen=True)
class Case:
    """A corruption: of the row's values (`change`) or of its line (`spoil`), and what must be said about it."""

    number: int
    name: str
    kind: str
    column: str | None
    change: Callable[[Row], Any] | None = None
    spoil: Callable[[bytes], bytes] | None = None
    base: Callable[[int], Row] = text_pair
    parquet: bool = False
    rules: Row = field(default_factory=dict)


CHAT: Row = {"base": chat_pair, "parquet": True}
MARGIN: Row = {"base": with_margin, "rules": {"required_columns": ("margin",)}}
SEGMENTS: Row = {"base": with_segments, "parquet": True, "rules": {"required_columns": ("segments",)}}
TURN = {"role": "assistant", "content": " and more"}

CASES = [
    Case(1, "cut-off line", "cut_off_line", None, spoil=lambda line: line[: len(line) // 2]),
    Case(1, "cut off between values", "cut_off_line", None, spoil=lambda line: line[: line.index(b'"rejected"')]),
    Case(2, "stray comma in the object", "stray_comma", None, spoil=lambda line: line[:-1] + b",}"),
    Case(2, "stray comma after the object", "stray_comma", None, spoil=lambda line: line + b","),
    Case(3, "two objects on a line", "two_objects", None, spoil=lambda line: line + b" " + line),
    Case(4, "list on a line", "not_an_object", None, change=lambda row: list(row.values())),
    Case(4, "number on a line", "not_an_object", None, change=lambda row: 7),
    Case(5, "duplicate key", "duplicate_key", "chosen", spoil=lambda line: line[:-1] + b', "chosen": "b"}'),
    Case(6, "null prompt", "null_prompt", "prompt", put("prompt", None), parquet=True),
    Case(7, "null answer", "null_answer", "rejected", put("rejected", None), parquet=True),
    Case(7, "null completion", "null_answer", "completion", put("completion", None), base=labelled, parquet=True),
    Case(8, "number instead of text", "wrong_type", "chosen", put("chosen", 3)),
    Case(8, "list of numbers instead of text", "wrong_type", "chosen", put("chosen", [1, 2])),
    Case(8, "object instead of text", "wrong_type", "prompt", put("prompt", {"text": "x"})),
    Case(9, "missing answer column", "missing_column", "rejected", rename("rejected", "other")),
    Case(9, "missing prompt column", "missing_column", "prompt", rename("prompt", "question")),
    Case(9, "missing label column", "missing_column", "label", rename("label", "vote"), base=labelled),
    Case(9, "missing declared column", "missing_column", "margin", rename("margin", "gap"), **MARGIN),
    Case(10, "misspelt answer column", "misspelt_column", "rejcted", rename("rejected", "rejcted")),
    Case(10, "misspelt prompt column", "misspelt_column", "Prompts", rename("prompt", "Prompts")),
    Case(11, "empty answer", "empty_answer", "chosen", put("chosen", ""), parquet=True),
    Case(11, "empty assistant turn", "empty_answer", "chosen", message("chosen", content=""), **CHAT),
    Case(12, "blank answer", "blank_answer", "rejected", put("rejected", " \n\t"), parquet=True),
    Case(12, "blank completion", "blank_answer", "completion", put("completion", " "), base=labelled, parquet=True),
    Case(13, "empty message list", "empty_messages", "chosen", put("chosen", []), **CHAT),
    Case(13, "empty prompt list", "empty_messages", "prompt", put("prompt", []), **CHAT),
    Case(14, "message without role", "no_role", "prompt", message("prompt", role=None), **CHAT),
    Case(14, "unknown role", "unknown_role", "chosen", message("chosen", role="asistant"), **CHAT),
    Case(14, "null content", "null_content", "chosen", message("chosen", content=None), **CHAT),
    Case(14, "content as parts", "wrong_type", "prompt", message("prompt", content=[{"text": "x"}]), base=chat_pair),
    Case(15, "two assistant turns", "two_assistant_turns", "chosen",
         lambda row: {**row, "chosen": [*row["chosen"], TURN]}, **CHAT),
    Case(15, "prompt ends with an assistant turn", "two_assistant_turns", "chosen",
         lambda row: {**row, "prompt": [*row["prompt"], TURN]}, **CHAT),
    Case(16, "identical pair", "identical_pair", "rejected", same_answers, parquet=True),
    Case(16, "identical conversations", "identical_pair", "rejected", same_answers, **CHAT),
    Case(18, "NUL in a text", "control_character", "chosen", put("chosen", "a\x00b"), parquet=True),
    Case(18, "C0 in a message", "control_character", "prompt", message("prompt", content="a\x07"), **CHAT),
    Case(18, "unescaped control character", "control_character", None, spoil=lambda line: line.replace(b"pp", b"\x01")),
    Case(19, "lone surrogate", "lone_surrogate", "chosen", put("chosen", "a \ud83d")),
    Case(20, "invalid UTF-8", "encoding", None, spoil=lambda line: line.replace(b"pp", b"\xff")),
    Case(20, "UTF-16 line", "encoding", None, spoil=lambda line: line.decode().encode("utf-16-le")),
    Case(20, "byte-order mark inside the file", "encoding", None, spoil=lambda line: b"\xef\xbb\xbf" + line),
    Case(21, "line too long", "line_too_long", None, spoil=lambda line: line.replace(b"pp", b"pp" * 1000)),
    Case(24, "label 2", "bad_label", "label", put("label", 2), base=labelled),
    Case(24, "label 0.7", "bad_label", "label", put("label", 0.7), base=labelled),
    Case(24, "label as text", "bad_label", "label", put("label", "true"), base=labelled),
    Case(24, "null label", "bad_label", "label", put("label", None), base=labelled, parquet=True),
    Case(24, "margin NaN", "not_finite", "margin", put("margin", float("nan")), **MARGIN, parquet=True),
    Case(24, "margin inf", "not_finite", "margin", put("margin", float("inf")), **MARGIN, parquet=True),
    Case(24, "margin null", "not_a_number", "margin", put("margin", None), **MARGIN, parquet=True),
    Case(24, "margin as text", "not_a_number", "margin", put("margin", "0.5"), **MARGIN),
    Case(24, "segment outside the answer", "segment_bounds", "segments",
         put("segments", {"chosen": [0], "rejected": [1]}), **SEGMENTS),
]  # fmt: skip


def rows_with(case: Case, place: int) -> list[Any]:
    rows: list[Any] = [case.base(index) for index in range(ROWS)]
    if case.change:
        rows[place] = case.change(rows[place])
    return rows


def write_lines(case: Case, place: int, folder: Path) -> DataSpec:
    lines = [json.dumps(row).encode() for row in rows_with(case, place)]
    if case.spoil:
        lines[place] = case.spoil(lines[place])
    path = folder / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return DataSpec(data_files=str(path))


def write_parquet(case: Case, place: int, folder: Path) -> DataSpec:
    path = folder / "pairs.parquet"
    parquet.write_table(pa.Table.from_pylist(rows_with(case, place)), path, row_group_size=5)
    return DataSpec(data_files=str(path))


def in_memory(case: Case, place: int, folder: Path) -> DataSpec:
    return DataSpec(rows=rows_with(case, place), rows_name="my_rows")


def runs() -> list[Any]:
    made = []
    for case in CASES:
        writers = [write_lines]
        writers += [write_parquet] if case.parquet else []
        writers += [in_memory] if case.change else []
        for writer in writers:
            for place in PLACES:
                name = f"{case.number}-{case.name}-{writer.__name__}-{place}".replace(" ", "_")
                made.append(pytest.param(case, writer, place, id=name))
    return made


def named_place(writer: Callable[..., DataSpec], place: int) -> str:
    """How a message names the row."""
    names = {write_lines: f"pairs.jsonl:{place + 1}:", write_parquet: f"pairs.parquet, row {place}:"}
    return names.get(writer, f"my_rows, row {place}:")


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 2000)


@pytest.mark.parametrize(("case", "writer", "place"), runs())
def test_bad_row_is_named(case: Case, writer: Callable[..., DataSpec], place: int, tmp_path: Path) -> None:
    spec = writer(case, place, tmp_path)
    with pytest.raises(DataError) as caught:
        load_examples(spec, **case.rules)
    said = str(caught.value)
    assert named_place(writer, place) in said
    assert f"({case.kind})" in said
    assert said.endswith(ADVICE[case.kind])
    assert case.column is None or f"column `{case.column}`" in said

    loaded = load_examples(spec, on_bad_row="skip", **case.rules)
    good = [index for index in range(ROWS) if index != place]
    # A UTF-16 line ends one byte early in the eyes of a line reader; its other half is one bad line more.
    if case.name != "UTF-16 line":
        assert [example.where.row for example in loaded.examples] == good
        assert {kind: tally.count for kind, tally in loaded.report.problems.items()} == {case.kind: 1}
    assert named_place(writer, place).rstrip(":") in loaded.report.problems[case.kind].places[0]
    assert len(loaded.examples) == len(good)


def test_catalogue_is_covered() -> None:
    """All 24 kinds but those of the tokenizer (17, 22) and the one that must pass (23)."""
    assert {case.number for case in CASES} == set(range(1, 25)) - {17, 22, 23}


def test_last_line_cut_without_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(text_pair(index)) for index in range(3))[:-9])
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: .*cut_off_line"):
        load_examples(DataSpec(data_files=str(path)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv"])
def test_wide_file_is_refused_whole(encoding: str, name: str, tmp_path: Path) -> None:
    """There is no row to save, whatever is asked, and the message holds the command that converts the file."""
    path = tmp_path / name
    path.write_bytes(json.dumps(text_pair(0)).encode(encoding))
    with pytest.raises(DataError, match=r"pairs.*UTF-16.*iconv"):
        load_examples(DataSpec(data_files=str(path)), on_bad_row="skip")


def test_leading_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(text_pair(index)) for index in range(3)), encoding="utf-8-sig")
    assert len(load_examples(DataSpec(data_files=str(path))).examples) == 3


def test_invalid_utf8_in_parquet_names_its_row(tmp_path: Path) -> None:
    chosen = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    table = pa.table({"prompt": ["x", "y", "z"], "chosen": chosen, "rejected": ["d", "e", "f"]})
    parquet.write_table(table, tmp_path / "pairs.parquet")
    spec = DataSpec(data_files=str(tmp_path / "pairs.parquet"))
    with pytest.raises(DataError, match=r"pairs\.parquet, row 1: .*\(encoding\)"):
        load_examples(spec)
    assert [example.where.row for example in load_examples(spec, on_bad_row="skip").examples] == [0, 2]


HONEST_TEXTS = [
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 and flag \U0001f1eb\U0001f1f7",
    "skin \U0001f44d\U0001f3fd, variation \u2764\ufe0f",
    "right to left \u202eabc\u202c and \u05e9\u05dc\u05d5\u05dd",
    "joiner \u200d and non-joiner \u200c, zero width \u200b, soft\u00adhyphen, mark \ufeff",
    "escape \x1b[31mred\x1b[0m, tab\tand\r\nline ends, \u2028 next line \x85",
    "combining e\u0301 stays apart from \xe9",
]


@pytest.mark.parametrize("text", HONEST_TEXTS)
def test_unusual_text_passes_unchanged(text: str, tmp_path: Path) -> None:
    rows = [{"prompt": text, "chosen": f" {text} a", "rejected": f" {text} b"}]
    (tmp_path / "raw.jsonl").write_bytes(json.dumps(rows[0], ensure_ascii=False).encode())
    (tmp_path / "escaped.jsonl").write_text(json.dumps(rows[0]))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    specs = [DataSpec(data_files=str(tmp_path / name)) for name in ("raw.jsonl", "escaped.jsonl", "rows.parquet")]
    for spec in [*specs, DataSpec(rows=rows)]:
        (example,) = load_examples(spec).examples
        assert (example.prompt, example.chosen, example.rejected) == tuple(rows[0].values())


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_numbers_json_does_not_have_are_refused_in_any_column(text: str, tmp_path: Path) -> None:
    line = json.dumps({**text_pair(0), "note": 1}).replace('"note": 1', f'"note": {{"deep": [{text}]}}')
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: column `note`: .*\(not_finite\)"):
        load_examples(DataSpec(data_files=str(tmp_path / "pairs.jsonl")))


def test_skipping_stops_at_the_limit(tmp_path: Path) -> None:
    rows: list[Row] = [text_pair(index) for index in range(ROWS)]
    for index in (2, 4, 6):
        rows[index]["chosen"] = ""
    spec = DataSpec(rows=rows, rows_name="my_rows")
    assert len(load_examples(spec, on_bad_row="skip", max_bad_rows=3).examples) == ROWS - 3
    with pytest.raises(DataError, match="more than 2 bad rows") as caught:
        load_examples(spec, on_bad_row="skip", max_bad_rows=2)
    assert "my_rows, row 6" in str(caught.value)
    assert "empty_answer: 3" in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_damaged_files_are_refused_in_words(suffix: str, tmp_path: Path) -> None:
    """500 random damages: the file loads, or a `UserError` says why; nothing else is ever raised."""
    rng = random.Random(0)
    path = tmp_path / f"pairs.{suffix}"
    rows = [chat_pair(index) if suffix == "jsonl" else text_pair(index) for index in range(4)]
    whole = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows, indent=1),
        "csv": "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]),
    }[suffix].encode()
    patches = (b"", b",", b'"', b"}", b"[" * 300, b"\xff", b"\n", b"9" * 5000)
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            content[at : at + rng.choice((0, 1, 7))] = rng.choice(patches)
        path.write_bytes(content)
        for policy in ("error", "skip"):
            try:
                load_examples(DataSpec(data_files=str(path)), on_bad_row=policy)
            except UserError as error:
                assert "pairs" in str(error)


def bad_row_table() -> str:
    """Number, corruption and message of every case, as lines of a Markdown table."""
    lines = ["| corruption | kind | message |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            try:
                load_examples(write_lines(case, 6, Path(folder)), **case.rules)
            except DataError as error:
                said = str(error).replace(f"{folder}/", "").replace("|", "\\|")
                lines.append(f"| {case.name} | `{case.kind}` | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    json_rows.MAX_LINE_BYTES = 2000
    print(bad_row_table())
