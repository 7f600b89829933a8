"""File formats: one content gives the same examples from every format, and every row knows its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from prefopt.data import DataSpec, LoadedExamples, load_examples
from prefopt.errors import DataError
from tests.helpers import text_pairs

Row = dict[str, Any]


def write_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def parts(loaded: LoadedExamples) -> list[Row]:
    return [{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in loaded.examples]


def chats(n: int) -> list[Row]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": row[key]}] for key in roles} for row in text_pairs(n)]


@pytest.mark.parametrize("rows", [text_pairs(5), chats(5)], ids=["text", "chat"])
def test_every_format_gives_the_same_examples(rows: list[Row], tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "a.ndjson", rows)
    write_lines(tmp_path / "a.json", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "by_split")
    cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [list(rows[0]), *cells]
        quoted = [separator.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
        (tmp_path / name).write_text("\n".join(quoted))
    files = ["a.jsonl", "a.ndjson", "a.json", "b.json", "a.parquet", "a.csv", "a.tsv"]
    specs = [DataSpec(data_files=str(tmp_path / name)) for name in files]
    specs += [DataSpec(path=str(tmp_path / name)) for name in ("saved", "by_split")]
    specs += [DataSpec(rows=rows), DataSpec(rows=table), DataSpec(rows={"train": table})]
    loaded = [load_examples(spec) for spec in specs]
    assert all(parts(one) == rows for one in loaded)
    assert len({tuple(example.example_id for example in one.examples) for one in loaded}) == 1


def test_places_in_json_lines_and_lists(tmp_path: Path) -> None:
    rows = text_pairs(3)
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    by_line = load_examples(DataSpec(data_files=str(tmp_path / "a.jsonl"))).examples
    in_list = load_examples(DataSpec(data_files=str(tmp_path / "a.json"))).examples
    assert [(one.where.row, one.where.line) for one in by_line] == [(0, 1), (1, 3), (2, 5)]
    assert [(one.where.row, one.where.line) for one in in_list] == [(0, 2), (1, 7), (2, 12)]


def test_bad_element_of_a_list_is_skipped_and_broken_json_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows: list[Any] = [*text_pairs(2), 7, *text_pairs(1, seed=1)]
    path.write_text(json.dumps(rows, indent=1))
    loaded = load_examples(DataSpec(data_files=str(path)), on_bad_row="skip")
    assert loaded.report.problems["not_an_object"].places == [f"{path}:12"]
    assert [example.where.row for example in loaded.examples] == [0, 1, 3]
    whole = json.dumps(rows)
    for broken, kind in ((whole[:-1], "cut_off_line"), (whole + "x", "bad_json"), ("[{},]", "stray_comma")):
        path.write_text(broken)
        with pytest.raises(DataError, match=rf"a\.json:1.*\({kind}\)"):
            load_examples(DataSpec(data_files=str(path)), on_bad_row="skip")


def test_csv_places_types_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "prompt,chosen,rejected,score,flag,code,note\n"
        '"two\nlines", a, b,0.5,true,007,\n'
        "q,[INST] a, b,-3,False,1_0,[1\n"
        "q,a\n"
        'q,"[{""role""", b,1,,,\n'
    )  # fmt: skip
    loaded = load_examples(DataSpec(data_files=str(path)), on_bad_row="skip")
    first, second = loaded.examples
    assert (first.where.line, second.where.line) == (2, 4)
    assert first.columns == {"score": 0.5, "flag": True, "code": "007", "note": None}
    assert second.columns == {"score": -3, "flag": False, "code": "1_0", "note": "[1"}
    assert second.chosen == "[INST] a"
    assert loaded.report.problems["cell_count"].places == [f"{path}:5"]
    assert loaded.report.problems["cut_off_line"].places == [f"{path}:6 `chosen`"]


def test_labels_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\nq,a,True\nq,b,0\n")
    loaded = load_examples(DataSpec(data_files=str(tmp_path / "a.csv")))
    assert [example.desirable for example in loaded.examples] == [True, False]


def test_nulls_that_arrow_fills_in_are_taken_out(tmp_path: Path) -> None:
    rows = chats(2)
    rows[0]["prompt"][0]["name"] = "ann"
    rows[1]["chosen"] = [{"role": "assistant", "content": "a", "tool_calls": [{"x": 1}]}]
    rows[0]["tools"] = [{"name": "add"}]
    rows[1]["tools"] = [{"kind": "function"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = load_examples(DataSpec(data_files=str(tmp_path / "a.parquet"))).examples
    assert first.chosen == rows[0]["chosen"] and second.prompt == rows[1]["prompt"]
    assert (first.tools, second.tools) == ([{"name": "add"}], [{"kind": "function"}])
    in_memory = load_examples(DataSpec(rows=rows)).examples
    assert [one.example_id for one in in_memory] == [first.example_id, second.example_id]


def test_cut_off_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(text_pairs(50)), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        load_examples(DataSpec(data_files=str(path)))


def test_a_target_in_csv_is_text_although_it_looks_like_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,target,weight\nq,4,5,42,2\n")
    loaded = load_examples(DataSpec(data_files=str(tmp_path / "a.csv")), optional_columns=("target", "weight"))
    assert loaded.examples[0].columns == {"target": "42", "weight": 2}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"no row can be used(.|\n)*{name}: 0 rows"):
        load_examples(DataSpec(data_files=str(tmp_path / name)))


def test_all_rows_bad_is_refused_with_the_counts() -> None:
    rows = [{**row, "chosen": ""} for row in text_pairs(3)]
    with pytest.raises(DataError, match="no row can be used") as caught:
        load_examples(DataSpec(rows=rows), on_bad_row="skip")
    assert "rows: 3 rows, 3 bad, 0 examples\nleft out, empty_answer: 3" in str(caught.value)
