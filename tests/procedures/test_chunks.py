"""Chunks divide the rows: every row in one of them, in an order that does not depend on how the rows were listed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import pytest

from prefopt.data.problems import DataReport
from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.errors import DataError, RecipeError
from prefopt.procedures.chunks import EASY, GIVEN, RANDOM, Cut, Rows, load_rows, order_chunks, read_cut, write_chunks
from prefopt.procedures.easiness import Gap, easiness
from prefopt.recipe import load_recipe
from prefopt.recipe.sections import DataSection, DatasetEntry
from tests.helpers import text_pairs

COLUMN = Cut("column", 3, ("a", "b", "c"), column="source")


def rows_of(*sources: str) -> Rows:
    """One pair for each of these values of a column."""
    pairs = text_pairs(len(sources), seed=len(sources))
    examples = load_examples(
        DataSpec(rows=[{**row, "source": source} for row, source in zip(pairs, sources, strict=True)])
    ).examples
    return Rows(examples, [0] * len(examples), None, DataReport())


def gaps_of(rows: Rows, sums: list[float]) -> dict[str, Gap]:
    return {example.example_id: Gap(gap, -gap) for example, gap in zip(rows.train, sums, strict=True)}


def ids(chunks) -> list[list[str]]:
    return [[example.example_id for example in chunk.examples] for chunk in chunks]


@pytest.mark.parametrize("order", [GIVEN, EASY, RANDOM])
@pytest.mark.parametrize(
    "cut", [COLUMN, Cut("rows", 3), Cut("rows", 2, sizes=(1, 5))], ids=["column", "equal", "sizes"]
)
def test_every_row_is_in_one_chunk(cut, order):
    rows = rows_of("a", "b", "c", "b", "a", "a")
    chunks = order_chunks(cut, rows, order, gaps=gaps_of(rows, [1, -2, 3, -4, 5, -6]))
    assert len(chunks) == cut.count
    assert Counter(chain.from_iterable(ids(chunks))) == Counter(example.example_id for example in rows.train)
    given = {example.example_id: place for place, example in enumerate(rows.train)}
    for chunk in ids(chunks):  # inside, the order of the data, so that one chunk is the plain run
        assert [given[name] for name in chunk] == sorted(given[name] for name in chunk)


def test_chunks_come_by_falling_accuracy_and_ties_as_given():
    rows = rows_of("a", "a", "b", "b", "c", "c")
    gaps = gaps_of(rows, [-1, -1, 5, -9, 0.1, -0.1])
    assert [chunk.name for chunk in order_chunks(COLUMN, rows, EASY, gaps=gaps)] == ["b", "c", "a"]
    assert [chunk.name for chunk in order_chunks(COLUMN, rows, GIVEN)] == ["a", "b", "c"]
    assert [chunk.name for chunk in order_chunks(COLUMN, rows, EASY, gaps=gaps, length="mean")] == ["a", "b", "c"]


def test_the_order_does_not_depend_on_how_the_chunks_are_listed():
    rows = rows_of("a", "a", "b", "b", "c", "c")
    gaps = gaps_of(rows, [1, -1, 1, 2, -1, -2])
    for names in [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")]:
        cut = Cut("column", 3, names, column="source")
        assert [chunk.name for chunk in order_chunks(cut, rows, EASY, gaps=gaps)] == ["b", "a", "c"]


def test_rows_of_one_source_are_cut_by_their_own_easiness():
    rows = rows_of(*"aaaa")
    gaps = gaps_of(rows, [-5, 7, 0.5, -1])
    easy, hard = order_chunks(Cut("rows", 2), rows, EASY, gaps=gaps)
    names = [example.example_id for example in rows.train]
    assert ids([easy, hard]) == [[names[1], names[2]], [names[0], names[3]]]


def test_a_random_order_is_that_of_its_seed():
    rows = rows_of(*"aaaaaaaa")
    first, again, other = (order_chunks(Cut("rows", 2), rows, RANDOM, seed=seed) for seed in (0, 0, 1))
    assert ids(first) == ids(again) != ids(other)
    assert ids(first) != ids(order_chunks(Cut("rows", 2), rows, GIVEN))


def test_equal_parts_differ_by_one_row_at_most():
    chunks = order_chunks(Cut("rows", 3), rows_of(*"aaaaa"), GIVEN)
    assert [len(chunk.examples) for chunk in chunks] == [2, 2, 1]


def test_easiness_counts_a_tie_as_wrong_and_leaves_out_what_was_dropped():
    rows = rows_of(*"aaaa")
    gaps = gaps_of(rows, [2, 0, -1, 9])
    del gaps[rows.train[3].example_id]
    figures = easiness(rows.train, gaps, "sum")
    third = pytest.approx(1 / 3)
    assert (figures["pairs"], figures["accuracy"], figures["gap"]) == (3, third, third)
    assert figures["gap_per_token"] == pytest.approx(-1 / 3)
    assert easiness([], gaps, "sum")["accuracy"] is None


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut("rows", 2, sizes=(2, 3)), "sizes of 2, 3 do not divide the 4 training rows"),
        (Cut("rows", 5), "none is empty"),
        (Cut("column", 2, ("a", "c"), column="source"), "is `b`, which procedure.chunks.values does not list"),
        (Cut("column", 1, ("a",), column="sourse"), "no column `sourse`. Did you mean `source`"),
        (Cut("column", 3, ("a", "b", "d"), column="source"), "no training row belongs to `d`"),
    ],
)
def test_a_cut_that_does_not_fit_the_rows_is_refused(cut, message):
    with pytest.raises(DataError, match=message):
        order_chunks(cut, rows_of("a", "a", "b", "a"), GIVEN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "chunks: missing. Write `datasets`"),
        ("datasets", "no list of `datasets` or `data_files`"),
        ("dataset", "'dataset' is not known"),
        (0, "0 is not known"),
        (True, "True is not known"),
        ({"sizes": [3, 0]}, "whole numbers from 1 on"),
        ({"column": "source"}, "List the values of `source`"),
        ({"column": "source", "values": ["a", "a"]}, "listed twice"),
        ({"column": "source", "value": ["a"]}, "Did you mean `values`"),
    ],
)
def test_mistakes_in_the_block(given, message):
    with pytest.raises(RecipeError, match=message):
        read_cut(given, DataSection(data_files="pairs.jsonl"))


def test_what_a_block_says():
    files = DataSection(data_files=["a.jsonl", "b.jsonl"])
    entries = DataSection(datasets=(DatasetEntry(path="org/x"), DatasetEntry(data_files="y.jsonl")))
    assert read_cut("datasets", files) == Cut("datasets", 2, ("a.jsonl", "b.jsonl"))
    assert read_cut("datasets", entries) == Cut("datasets", 2, ("org/x", "y.jsonl"))
    assert read_cut(3, files) == Cut("rows", 3)
    assert read_cut({"sizes": [1, 2]}, files) == Cut("rows", 2, sizes=(1, 2))
    assert read_cut({"column": "n", "values": [1, 2]}, files) == Cut("column", 2, ("1", "2"), column="n")


RECIPE = """
model_name_or_path: tiny
loss: {name: dpo}
output_dir: run
"""


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("held_out", [None, 3])
def test_rows_keep_the_data_set_they_come_from(tmp_path, held_out):
    pairs = text_pairs(12)
    files = [write(tmp_path / "a.jsonl", pairs[:4]), write(tmp_path / "b.jsonl", pairs[4:])]
    (tmp_path / "r.yaml").write_text(RECIPE)
    overrides = ["--data_files", json.dumps(files), *(["--test_split_size", str(held_out)] if held_out else [])]
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    rows = load_rows(recipe, read_cut("datasets", recipe.data))
    first = {row["prompt"] + row["chosen"] for row in pairs[:4]}
    assert [source == 0 for source in rows.sources] == [
        example.prompt + example.chosen in first for example in rows.train
    ]
    assert len(rows.train) + len(rows.test or []) == 12
    assert (rows.test is None) == (held_out is None)


def test_test_rows_of_a_list_of_files(tmp_path):
    pairs = text_pairs(9)
    block = {
        "train": [write(tmp_path / "a.jsonl", pairs[:2]), write(tmp_path / "b.jsonl", pairs[2:5])],
        "test": write(tmp_path / "t.jsonl", pairs[5:]),
    }
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml", ["--data_files", json.dumps(block)])
    rows = load_rows(recipe, read_cut("datasets", recipe.data))
    assert (rows.sources, len(rows.test or [])) == ([0, 0, 1, 1, 1], 4)


def test_a_chunk_file_reads_back_as_the_same_rows_with_all_columns(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    chat = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": [{"name": "clock"}],
        "score_chosen": 1.5,
        "note": {"by": ["me", None]},
        "missing": float("nan"),
    }
    examples = load_examples(DataSpec(rows=[chat])).examples
    rows = Rows(examples, [0], None, DataReport())
    write_chunks(tmp_path, order_chunks(Cut("rows", 1), rows, GIVEN), examples, {"rows": 1})
    (again,) = load_examples(DataSpec(data_files=str(tmp_path / "chunk-1.jsonl"))).examples
    assert again.example_id == examples[0].example_id
    assert {**again.columns, "missing": None} == {**examples[0].columns, "missing": None}
    assert load_examples(DataSpec(data_files=str(tmp_path / "test.jsonl"))).examples[0].tools == [{"name": "clock"}]


def test_two_data_sets_of_one_title_keep_their_own_places_and_names():
    sources = {"hard": [-1.0, -2.0], "easy": [1.0, 2.0]}
    entries = tuple(DatasetEntry(path="org/x", split=split) for split in sources)
    cut = read_cut("datasets", DataSection(datasets=entries))
    assert cut.names == ("org/x, hard", "org/x, easy")
    rows = rows_of("a", "b", "c", "d")
    rows = Rows(rows.train, [0, 0, 1, 1], None, DataReport())
    gaps = gaps_of(rows, [gap for part in sources.values() for gap in part])
    for names in (cut.names, ("same", "same")):
        first, _ = order_chunks(Cut("datasets", 2, names), rows, EASY, gaps=gaps)
        assert ids([first]) == [[example.example_id for example in rows.train[2:]]]


def test_an_answer_that_was_cut_off_is_so_in_its_chunk_too(tmp_path):
    pairs = [{**row, "unfinished": ["rejected"]} for row in text_pairs(2)]
    examples = load_examples(DataSpec(rows=pairs)).examples
    cut = Cut("rows", 1)
    chunks = order_chunks(cut, Rows(examples, [0, 0], None, DataReport()), GIVEN)
    write_chunks(tmp_path, chunks, None, {})
    again = load_examples(DataSpec(data_files=str(tmp_path / "chunk-1.jsonl"))).examples
    assert [example.unfinished for example in again] == [("rejected",)] * 2
