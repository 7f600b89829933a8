"""Where rows come from: files, folders, the library's data sets, mixtures, samples, test splits, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefopt.data import DataSpec, LoadedExamples, load_examples, load_train_test, sources, split_by_prompt
from prefopt.errors import DataError, RecipeError
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


# Which files


def test_names_patterns_lists_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text_pairs(4)
    for index, row in enumerate(rows):
        write_lines(tmp_path / f"part{index}.jsonl", [row])
    monkeypatch.chdir(tmp_path)
    everything = load_examples(DataSpec(data_files="part*.jsonl"))
    assert parts(everything) == rows
    assert str(everything.examples[2].where) == "part2.jsonl:1"
    assert parts(load_examples(DataSpec(data_files=["part3.jsonl", "part[01].jsonl"]))) == [rows[3], rows[0], rows[1]]
    by_split = {"train": "part0.jsonl", "test": ["part1.jsonl", "part2.jsonl"]}
    assert parts(load_examples(DataSpec(data_files=by_split))) == rows[:1]
    assert parts(load_examples(DataSpec(data_files=by_split, split="test"))) == rows[1:3]
    assert parts(load_examples(DataSpec(path="json", data_files="part1.jsonl"))) == rows[1:2]
    assert parts(load_examples(DataSpec(path="part1.jsonl"))) == rows[1:2]
    with pytest.raises(DataError, match=r"no split `tset`. Did you mean `test`\? Splits: train, test"):
        load_examples(DataSpec(data_files=by_split, split="tset"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pears.jsonl", r"no such file. Did you mean `pairs.jsonl`\?"),
        ("nowhere/pairs.jsonl", r"the folder nowhere does not exist"),
        ("*.csv", "no file matches"),
        (".", "this is a folder"),
        ("https://host/pairs.jsonl", "Download it"),
        ("notes.jsnol", r"files ending in `.jsnol` are not read. Did you mean `.jsonl`\?"),
    ],
)
def test_file_that_cannot_be_read(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "pairs.jsonl", text_pairs(1))
    write_lines(tmp_path / "notes.jsnol", text_pairs(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        load_examples(DataSpec(data_files=name))


# Columns


def test_column_names_and_kept_columns(tmp_path: Path) -> None:
    rows = [{"question": r["prompt"], "good": r["chosen"], "rejected": r["rejected"], "gap": 1} for r in text_pairs(3)]
    names = {"prompt": "question", "chosen": "good", "margin": "gap"}
    path = write_lines(tmp_path / "a.jsonl", rows)
    for source in ({"data_files": path}, {"rows": rows}, {"rows": datasets.Dataset.from_list(rows)}):
        loaded = load_examples(DataSpec(**source, column_names=names), required_columns=("margin",))
        assert parts(loaded) == text_pairs(3)
        assert loaded.examples[0].columns == {"margin": 1}
    kept = DataSpec(rows=rows, column_names=names, columns=["question", "good", "rejected"])
    assert load_examples(kept).examples[0].columns == {}


def test_columns_can_be_swapped() -> None:
    swapped = DataSpec(rows=text_pairs(1), column_names={"chosen": "rejected", "rejected": "chosen"})
    (row,) = text_pairs(1)
    assert parts(load_examples(swapped)) == [{**row, "chosen": row["rejected"], "rejected": row["chosen"]}]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"column_names": {"prompt": "promp"}}, r"row 0: column `promp`: .*Did you mean `prompt`\?.*missing_column"),
        ({"column_names": {"chosen": "rejected"}}, r"row 0: column `chosen`: .*column_clash"),
        ({"columns": ["prompt", "choosen"]}, r"row 0: column `choosen`: .*Did you mean `chosen`\?.*missing_column"),
    ],
)
def test_wrong_column_maps(spec: Row, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_examples(DataSpec(rows=text_pairs(2), **spec))


def test_prompt_text_beside_whole_conversations_can_be_left_out() -> None:
    rows = [{"prompt": "q", "chosen": chat["prompt"] + chat["chosen"], "rejected": chat["prompt"] + chat["rejected"]}
            for chat in chats(2)]  # fmt: skip
    assert parts(load_examples(DataSpec(rows=rows, columns=["chosen", "rejected"]))) == chats(2)


# The datasets library


def test_folder_of_files_goes_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", text_pairs(3))
    write_lines(folder / "test.jsonl", text_pairs(2, seed=1))
    train, test = load_train_test(DataSpec(path=str(folder), test_split="test"))
    assert parts(train) == text_pairs(3)
    assert test is not None and parts(test) == text_pairs(2, seed=1)
    assert str(train.examples[1].where) == f"{folder} [train], row 1"
    with pytest.raises(DataError, match=r"set \[tran\]: the data set cannot be loaded: Unknown split"):
        load_examples(DataSpec(path=str(folder), split="tran"))


def test_hub_arguments_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.Dataset:
        seen.append((path, name, options))
        return datasets.Dataset.from_list([{**row, "chosen": ""} for row in text_pairs(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DataSpec(path="org/set", name="small", data_dir="d", data_files="x/*.parquet", revision="abc", split="val")
    with pytest.raises(DataError, match=r"org/set \[val\], row 0: column `chosen`"):
        load_examples(spec)
    options = {"data_dir": "d", "data_files": "x/*.parquet", "split": "val", "revision": "abc"}
    assert seen == [("org/set", "small", options)]


def test_unreachable_data_set_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/set' on the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/set \[train\]: .*Couldn't reach 'org/set' on the Hub. Check its name"):
        load_examples(DataSpec(path="org/set"))


def test_saved_folder_without_the_split(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(text_pairs(1))).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no split `test`.*Splits: train"):
        load_examples(DataSpec(path=str(tmp_path / "saved"), split="test"))


def test_tensor_formatted_set_in_memory_is_read_as_plain_values() -> None:
    table = datasets.Dataset.from_list([{**row, "margin": 0.5} for row in text_pairs(2)]).with_format("numpy")
    loaded = load_examples(DataSpec(rows=table, rows_name="train_dataset"), required_columns=("margin",))
    assert parts(loaded) == text_pairs(2)
    assert str(loaded.examples[1].where) == "train_dataset, row 1"


# Mixtures and samples


def test_mixture_keeps_order_ids_and_counts(tmp_path: Path) -> None:
    first, second = text_pairs(6), chats(4)
    entries = [
        DataSpec(data_files=write_lines(tmp_path / "a.jsonl", first), fraction=0.5),
        DataSpec(rows=second, rows_name="chats"),
    ]
    loaded = load_examples(DataSpec(mixture=entries))
    alone = [load_examples(entry) for entry in entries]
    assert [one.example_id for one in loaded.examples] == [one.example_id for part in alone for one in part.examples]
    counts = [(count.rows, count.bad_rows, count.examples) for count in loaded.report.sources]
    assert counts == [(6, 0, 3), (4, 0, 4)]
    assert [count.name for count in loaded.report.sources] == [str(tmp_path / "a.jsonl"), "chats"]


def test_mixture_of_pairs_and_single_answers_is_refused() -> None:
    single = [{"prompt": "q", "completion": "a", "label": True}]
    entries = [DataSpec(rows=text_pairs(1)), DataSpec(rows=single, rows_name="votes")]
    with pytest.raises(DataError, match=r"votes, row 0: the row is a labelled answer"):
        load_examples(DataSpec(mixture=entries))
    apart = load_examples(DataSpec(mixture=entries), paired=False).examples
    assert [example.desirable for example in apart] == [True, False, True]


def test_fraction_is_a_reproducible_sample_in_order() -> None:
    def rows_of(fraction: float, seed: int) -> list[int]:
        loaded = load_examples(DataSpec(rows=text_pairs(40), fraction=fraction, seed=seed))
        return [example.where.row for example in loaded.examples]

    half = rows_of(0.5, 0)
    assert len(half) == 20 and half == sorted(half) and half != list(range(20))
    assert half == rows_of(0.5, 0) != rows_of(0.5, 1)
    assert set(rows_of(0.25, 0)) < set(half)
    assert rows_of(1.0, 0) == list(range(40))
    assert len(rows_of(0.001, 0)) == 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "name one source"),
        ({"data_files": "a", "rows": []}, "name one source"),
        ({"data_files": "a", "mixture": [DataSpec(path="b")]}, "name one source"),
        ({"data_files": "a", "name": "small"}, "go with a data set's `path`"),
        ({"path": "a", "fraction": 0}, "fraction is 0"),
        ({"path": "a", "fraction": 1.5}, "fraction is 1.5"),
        ({"path": "a", "test_split_size": 1.0}, "test_split_size is 1.0"),
        ({"path": "a", "test_split_size": 0}, "test_split_size is 0"),
        ({"path": "a", "column_names": {"prompt": "q", "chosen": "q"}}, "two of our columns"),
        ({"mixture": [DataSpec(path="b")], "fraction": 0.5}, "`fraction` stands beside a mixture"),
        ({"mixture": [DataSpec(path="b", test_split_size=2)]}, "an entry of a mixture is one source"),
    ],
)
def test_senseless_specs_are_refused(spec: Row, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        DataSpec(**spec)


def test_spec_from_a_block() -> None:
    entry = {"path": "org/set", "split": "test", "columns": ["chosen", "rejected"], "fraction": 0.5}
    assert DataSpec.from_mapping(entry, seed=3) == DataSpec(**entry, seed=3)
    with pytest.raises(RecipeError, match=r"`fractoin` is not known. Did you mean `fraction`\?"):
        DataSpec.from_mapping({"path": "a", "fractoin": 0.5})


@pytest.mark.parametrize(
    ("rules", "said"),
    [({"on_bad_row": "skp"}, r"Did you mean `skip`\?"), ({"max_bad_rows": 3}, "max_bad_rows has no effect")],
)
def test_senseless_rules_are_refused(rules: Row, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_examples(DataSpec(rows=text_pairs(1)), **rules)


# Test splits


@pytest.mark.parametrize("size", [8, 0.2])
def test_equal_prompts_stay_on_one_side(size: float) -> None:
    rows = [{**row, "prompt": f"prompt {index // 2}"} for index, row in enumerate(text_pairs(40))]
    train, test = load_train_test(DataSpec(rows=rows, test_split_size=size))
    assert test is not None and len(test.examples) == 8
    assert not {str(one.prompt) for one in train.examples} & {str(one.prompt) for one in test.examples}
    together = sorted([*train.examples, *test.examples], key=lambda one: one.where.row)
    assert parts(LoadedExamples(together, train.report)) == rows
    assert train.report.held_out == 8


def test_test_split_is_stable_under_order_and_new_rows() -> None:
    examples = load_examples(DataSpec(rows=text_pairs(60))).examples
    test = {one.example_id for one in split_by_prompt(examples, 12, seed=1)[1]}
    assert {one.example_id for one in split_by_prompt(examples[::-1], 12, seed=1)[1]} == test
    assert {one.example_id for one in split_by_prompt(examples, 12, seed=2)[1]} != test
    more = [*examples, *load_examples(DataSpec(rows=text_pairs(3, seed=9))).examples]
    assert len(test - {one.example_id for one in split_by_prompt(more, 12, seed=1)[1]}) <= 3


def test_test_split_that_leaves_nothing_is_refused() -> None:
    examples = load_examples(DataSpec(rows=[{**row, "prompt": "same"} for row in text_pairs(5)])).examples
    with pytest.raises(DataError, match=r"takes all 5 examples \(1 prompts\)"):
        split_by_prompt(examples, 2)


def test_without_a_test_split_there_is_none() -> None:
    assert load_train_test(DataSpec(rows=text_pairs(2)))[1] is None


def test_mixture_loads_its_test_splits(tmp_path: Path) -> None:
    files = {split: write_lines(tmp_path / f"{split}.jsonl", text_pairs(n)) for split, n in (("train", 3), ("test", 2))}
    _, test = load_train_test(DataSpec(mixture=[DataSpec(data_files=files)] * 2, test_split="test"))
    assert test is not None and len(test.examples) == 4


def test_an_entry_of_a_mixture_may_alone_have_a_test_split(tmp_path: Path) -> None:
    files = {split: write_lines(tmp_path / f"{split}.jsonl", text_pairs(n)) for split, n in (("train", 3), ("held", 2))}
    entries = [DataSpec(data_files=files, test_split="held"), DataSpec(rows=text_pairs(4))]
    train, test = load_train_test(DataSpec(mixture=entries))
    assert test is not None and (len(train.examples), len(test.examples)) == (7, 2)


# Reports


def test_report_is_json_and_text() -> None:
    rows = [*text_pairs(8), {"prompt": "q"}, 3, *text_pairs(1)]
    report = load_examples(DataSpec(rows=rows), on_bad_row="skip").report
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert report.as_dict()["bad_rows"] == 2
    assert report.lines() == [
        "rows: 11 rows, 2 bad, 9 examples",
        "left out, missing_column: 1 (rows, row 8 `chosen`)",
        "left out, not_an_object: 1 (rows, row 9)",
        "noticed, duplicate_rows: 1 (rows, row 10)",
    ]


def test_report_shows_the_first_places_only() -> None:
    report = load_examples(DataSpec(rows=text_pairs(1) * 9)).report
    assert report.notes["duplicate_rows"].count == 8
    assert len(report.notes["duplicate_rows"].places) == 5
    assert str(report.notes["duplicate_rows"]).endswith("rows, row 5, ...)")


def test_rows_beyond_the_progress_threshold_are_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PROGRESS_FROM", 3)
    assert parts(load_examples(DataSpec(rows=text_pairs(7)))) == text_pairs(7)


# Real rows


@pytest.mark.parametrize(("split", "count"), [("train", 2400), ("eval", 300)])
def test_judged_pairs_pass(shared_data: Path, split: str, count: int) -> None:
    spec = DataSpec(data_files=str(shared_data / f"judged_pairs_{split}.jsonl"))
    loaded = load_examples(spec, required_columns=("score_chosen", "score_rejected"))
    assert len(loaded.examples) == count
    assert {example.kind for example in loaded.examples} == {"chat"}
    assert loaded.report.problems == {}
