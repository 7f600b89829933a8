"""Supervised rows, however they are written, are good answers and nothing else."""

from __future__ import annotations

import pytest

from prefopt.data.sources import load_examples, load_train_test
from prefopt.data.spec import DataSpec
from prefopt.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MORE = [*TURNS, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


def load(*rows):
    return load_examples(DataSpec(rows=list(rows)), supervised=True)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": "a", "completion": " b", "label": None}, "a", " b"),
        ({"prompt": "a", "completion": " b", "label": True}, "a", " b"),
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", " b"),
        ({"messages": TURNS}, TURNS[:1], TURNS[1:]),
        ({"messages": MORE, "prompt": "a", "prompt_id": "7"}, MORE[:3], MORE[3:]),
    ],
)
def test_ways_to_write_an_answer(row, prompt, completion):
    (example,) = load(row).examples
    assert (example.prompt, example.completion, example.desirable) == (prompt, completion, True)


def test_what_is_labelled_undesirable_is_left_out_and_counted():
    loaded = load({"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " c", "label": False})
    assert [example.completion for example in loaded.examples] == [" b"]
    assert loaded.report.notes["undesirable_left_out"].count == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": TURNS[:1]}, "row 0: column `messages`: a conversation needs"),
        ({"messages": MORE[:3]}, r"ends with a user message \(completion_end\)"),
        ({"messages": "a"}, "wrong_type"),
        ({"prompt": "a", "answer": "b"}, "missing_column"),
    ],
)
def test_rows_without_an_answer_are_named(row, said):
    with pytest.raises(DataError, match=said):
        load(row)


def test_without_the_rule_such_rows_are_refused_as_before():
    with pytest.raises(DataError, match="label"):
        load_examples(DataSpec(rows=[{"prompt": "a", "completion": " b"}]))


def test_part_is_held_back_as_ever():
    rows = [{"prompt": str(index), "completion": " b"} for index in range(10)]
    train, test = load_train_test(DataSpec(rows=rows, test_split_size=3), supervised=True)
    assert (len(train.examples), len(test.examples)) == (7, 3)
