"""Building segments: where conversations part, what is cut, which bounds are refused, and what is reported."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from prefopt import cli
from prefopt.data import DataSpec, load_examples
from prefopt.data.judge import BadBounds, check_bounds, parse_bounds
from prefopt.data.parting import Parted, cut, first_difference
from prefopt.data.segments import build_segments, selector_of
from prefopt.errors import DataError, UserError

SPEAKERS = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}


def said(text: str) -> list[dict[str, str]]:
    """Messages written "u1 a1 u2": the first letter is the speaker, the whole word the content."""
    return [{"role": SPEAKERS[word[0]], "content": word} for word in text.split()]


def words(messages: list[dict[str, Any]]) -> str:
    return " ".join(message["content"] for message in messages)


WON = said("s0 u1 a1 u2 a2 u3 a3 u4 a4 u5")
LOST = said("s0 u1 a1 u2 b2 v3 b3 v4 b4 v5".replace("b", "ab").replace("v", "uv"))


def build(select: str, **columns: Any):
    (row,), report = build_segments(DataSpec(rows=[{"chosen": WON, "rejected": LOST, **columns}]), selector_of(select))
    return row, report


def texts(row: dict[str, Any]) -> tuple[str, str, str]:
    return words(row["prompt"]), words(row["chosen"]), words(row["rejected"])


@pytest.mark.parametrize(
    ("select", "chosen", "rejected"),
    [
        ("single_turn", "a2", "ab2"),
        ("fixed:1", "a2", "ab2"),
        ("fixed:2", "a2 u3 a3", "ab2 uv3 ab3"),
        ("fixed:9", "a2 u3 a3 u4 a4", "ab2 uv3 ab3 uv4 ab4"),
        ("to_end", "a2 u3 a3 u4 a4", "ab2 uv3 ab3 uv4 ab4"),
    ],
)
def test_rules(select, chosen, rejected):
    row, report = build(select)
    assert texts(row) == ("s0 u1 a1 u2", chosen, rejected)
    turns = len(chosen.split()) // 2 + 1
    assert row["segments"] == {"chosen": list(range(turns)), "rejected": list(range(turns))}
    assert dict(report.turns) == {turns: 1}
    assert dict(report.cut_messages) == {2 * (6 - len(chosen.split())): 1}


def test_given_bounds_cut_after_their_end_and_count_from_their_start():
    row, _ = build("given", start_message=4, end_message=6, topic="x")
    assert texts(row) == ("s0 u1 a1 u2", "a2 u3 a3", "ab2 uv3 ab3")
    assert row["segments"] == {"chosen": [0, 1], "rejected": [0, 1]}
    assert row["topic"] == "x" and "start_message" not in row and "end_message" not in row
    later, _ = build("given", start_message=6, end_message=8)
    assert later["segments"] == {"chosen": [1, 2], "rejected": [1, 2]}


def test_the_shorter_side_sets_the_end_of_both():
    """As the authors cut: after the selected end, or after the shorter session's last message."""
    short = said("s0 u1 a1 u2 ab2 uv3 ab3 uv4")
    for chosen, rejected in ((WON, short), (short, WON)):
        rows, report = build_segments(DataSpec(rows=[{"chosen": chosen, "rejected": rejected}]), selector_of("to_end"))
        assert {words(rows[0]["chosen"]), words(rows[0]["rejected"])} == {"a2 u3 a3", "ab2 uv3 ab3"}
        assert dict(report.turns) == {2: 1}


def test_tool_messages_between_turns_move_no_border():
    chosen, rejected = said("u1 a1 t1 a2 u2 a3"), said("u1 ab1 u2 ab2 t3 t4 ab3 u5")
    row = cut(Parted(chosen, rejected, 1), 1, 3)
    assert (words(row["chosen"]), words(row["rejected"])) == ("a1 t1 a2", "ab1 u2 ab2")


def test_what_is_built_is_what_the_loader_takes():
    rules = {"optional_columns": ("segments", "turn_weights"), "paired": True}
    for select in ("single_turn", "fixed:2", "to_end"):
        row, _ = build(select)
        (example,) = load_examples(DataSpec(rows=[row]), **rules).examples
        assert words(example.chosen) == words(row["chosen"])


def test_a_history_of_its_own_is_put_before_both_sides():
    row = {"prompt": WON[:2], "chosen": WON[2:], "rejected": LOST[2:]}
    (built,), _ = build_segments(DataSpec(rows=[row]), selector_of("fixed:2"))
    assert texts(built) == texts(build("fixed:2")[0])


# ---- what is dropped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind"),
    [
        ("u1 a1 u2 a2", "u1 a1 u2 a2", "same"),
        ("u1 a1 u2 a2", "u1 a1 u2 a2 u3 a3", "one_goes_on"),
        ("u1 a1 u2 a2", "u1 a1 uv2 ab2", "partner_differs"),
        ("u1 a1 u2 a2", "u1 a1 t2 ab2", "partner_differs"),
        ("a1 u2 a2", "ab1 u2 a2", "no_history"),
    ],
)
def test_sessions_that_part_nowhere_useful(chosen, rejected, kind):
    with pytest.raises(BadBounds) as refused:
        first_difference(said(chosen), said(rejected))
    assert refused.value.kind == kind


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (2, 6, "start 2 lies before message 4, where the two part"),
        (5, 6, "start 5 is a message of the user"),
        (4, 5, "end 5 is a message of the user"),
        (4, 10, "end 10 lies outside the 10 messages"),
        (-1, 6, "start -1 lies outside"),
        (6, 4, "end 4 lies before the start 6"),
        (4.0, 6, "start 4.0 is not a whole number"),
        (4, "6", 'end "6" is not a whole number'),
        (True, 6, "start true is not a whole number"),
        (None, 6, "start null is not a whole number"),
    ],
)
def test_bad_bounds_are_refused_with_the_reason(first, last, message):
    with pytest.raises(BadBounds, match=message) as refused:
        check_bounds(first, last, WON, 4)
    assert refused.value.kind == "bad_bounds"


def test_a_rejected_side_that_ends_before_the_segment_is_dropped():
    with pytest.raises(BadBounds) as refused:
        cut(Parted(WON, said("s0 u1 a1 u2 ab2"), 4), 6, 8)
    assert refused.value.kind == "too_short"


@pytest.mark.parametrize(
    "answer",
    [
        '{"start": 4, "end": 6}',
        'The agent gives in at 4.\n```json\n{"start_message": 4, "end_message": 6, "why": "the price {4}"}\n```',
        'First {not json}, then {"start": 4, "end": 6}. Again: {"start": 4, "end": 6}',
        '{"thought": {"start": 1}} {"end": 6, "start": 4}',
    ],
)
def test_a_judges_answer(answer):
    assert parse_bounds(answer, WON, 4) == (4, 6)
    row, _ = build("judged:verdict", verdict=answer)
    assert texts(row)[1] == "a2 u3 a3"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "unreadable_answer"),
        ("start 4, end 6", "unreadable_answer"),
        ('{"start": 4}', "unreadable_answer"),
        ('{"start": 4, "end": 6', "unreadable_answer"),
        ('{"start": 4, "end": 6} or {"start": 4, "end": 8}', "unreadable_answer"),
        ('{"start": 4, "end": 60}', "bad_bounds"),
        ('{"start": 4, "end": 5}', "bad_bounds"),
        ('{"start": "4", "end": "6"}', "bad_bounds"),
        ('{"start": 2, "end": 6}', "bad_bounds"),
        ("{" * 5000, "unreadable_answer"),
        ('{"a":' * 5000, "unreadable_answer"),
    ],
)
def test_a_judges_bad_answer_drops_the_pair(answer, kind):
    with pytest.raises(BadBounds) as refused:
        parse_bounds(answer, WON, 4)
    assert refused.value.kind == kind


def test_the_report_counts_lengths_and_reasons_with_places(tmp_path):
    file = tmp_path / "sessions.jsonl"
    rows = [
        {"chosen": WON, "rejected": LOST, "start_message": 4, "end_message": 6},
        {"chosen": WON, "rejected": LOST, "start_message": 4, "end_message": 4},
        {"chosen": WON, "rejected": LOST, "start_message": 4, "end_message": 7},
        {"chosen": WON, "rejected": LOST},
        {"chosen": WON, "rejected": WON, "start_message": 4, "end_message": 6},
        {"chosen": WON},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built, report = build_segments(DataSpec(data_files=str(file)), selector_of("given"), on_bad_row="skip")
    assert len(built) == 2
    lines = report.lines()
    assert lines[0] == "2 of 5 pairs made, 1 bad rows"
    assert lines[1] == "assistant turns in a segment: 1: 1, 2: 1"
    assert lines[2] == "messages cut away: 6: 1, 10: 1"
    assert [line.split(" (")[0] for line in lines[3:]] == [
        "left out, bad_bounds: 1", "left out, no_bounds: 1", "left out, same: 1",
    ]  # fmt: skip
    assert "sessions.jsonl:3: the end 7 is a message of the user" in lines[3]
    with pytest.raises(DataError, match=r"sessions\.jsonl:6: column `rejected`: a pair of conversations needs"):
        build_segments(DataSpec(data_files=str(file)), selector_of("given"))


def test_no_pair_left_is_an_error_with_the_report():
    with pytest.raises(DataError, match=r"(?s)no pair is left:.*0 of 1 pairs made.*left out, same"):
        build_segments(DataSpec(rows=[{"chosen": WON, "rejected": WON}]), selector_of("to_end"))


# ---- selectors ------------------------------------------------------------------------------------------------------


def test_a_function_of_the_users(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def two(pair):\n    return pair.start, pair.start + 2\ndef bad(pair):\n    return 4\n")
    row, _ = build(f"{file}:two")
    assert texts(row)[1] == "a2 u3 a3"
    with pytest.raises(UserError, match="gave 4; write two numbers"):
        build(f"{file}:bad")
    with pytest.raises(UserError, match="has no function `three`"):
        selector_of(f"{file}:three")
    with pytest.raises(UserError, match="cannot be read"):
        selector_of(f"{tmp_path}/none.py:two")


@pytest.mark.parametrize("name", ["fixed", "fixed:0", "fixed:-1", "fixed:x", "judged:", "first", "to_end:2", ""])
def test_other_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"write single_turn, fixed:N, to_end"):
        selector_of(name)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "sessions.jsonl"
    file.write_text(json.dumps({"chosen": WON, "rejected": LOST, "score_chosen": 9}) + "\n")
    out = tmp_path / "new" / "pairs.jsonl"
    assert cli.main(["segments", "build", str(file), "--select", "fixed:2", "--out", str(out)]) == 0
    said_so = capsys.readouterr().out.splitlines()
    assert said_so[0] == "1 of 1 pairs made, 0 bad rows" and said_so[-1] == f"written to {out}"
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert texts(row) == ("s0 u1 a1 u2", "a2 u3 a3", "ab2 uv3 ab3") and row["score_chosen"] == 9
    assert cli.main(["segments", "build", str(file), "--select", "given", "--out", str(out)]) == 2
    assert "no_bounds: 1" in capsys.readouterr().err
    assert json.loads(out.read_text()) == row  # what was there is left


# ---- read without being built ---------------------------------------------------------------------------------------

TURNS = {"optional_columns": ("segments", "turn_weights"), "paired": True}
BOUNDED = {"chosen": WON, "rejected": LOST, "start_message": 4, "end_message": 6}


def read(*rows: dict[str, Any], **rules: Any):
    return load_examples(DataSpec(rows=list(rows)), **TURNS, **rules)


def test_whole_conversations_with_bounds_are_read_as_the_rows_that_are_built_of_them():
    later = {**BOUNDED, "start_message": 6, "end_message": 8}
    for row in (BOUNDED, later, {**BOUNDED, "prompt": WON[:2], "chosen": WON[2:], "rejected": LOST[2:], "topic": "x"}):
        built, _ = build_segments(DataSpec(rows=[row]), selector_of("given"))
        direct, made = read(row).examples[0], read(*built).examples[0]
        assert direct == dataclasses.replace(made, where=direct.where)
        assert len(direct.columns["segments"]["chosen"]) == 2


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({"start_message": 2}, "start_message", "start 2 lies before message 4, where the two part"),
        ({"end_message": 7}, "end_message", "end 7 is a message of the user"),
        ({"end_message": 10}, "end_message", "end 10 lies outside the 10 messages"),
        ({"start_message": 6, "end_message": 4}, "end_message", "end 4 lies before the start 6"),
        ({"end_message": None}, "end_message", "the row has no start_message and end_message"),
        ({"rejected": said("s0 u1 a1 uv2 ab2")}, "rejected", "the two part at message 3, which is not the assistant's"),
        ({"rejected": WON[:5]}, "rejected", "one conversation is the beginning of the other"),
        ({"rejected": said("s0 u1 a1 u2 ab2"), "start_message": 6}, "rejected", "ends before the segment begins"),
        ({"rejected": WON}, "rejected", "the same as `chosen`"),
        ({"segments": 1}, "segments", "the row has start_message and end_message as well"),
        ({"chosen": "u1 a1", "rejected": "u1 a2"}, "chosen", "start_message and end_message count messages"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_row_and_column(change, column, message):
    with pytest.raises(DataError, match=rf"rows, row 1: column `{column}`: .*{message}"):
        read(BOUNDED, {**BOUNDED, **change})
    report = read(BOUNDED, {**BOUNDED, **change}, on_bad_row="skip").report
    assert report.bad_rows == 1


def test_one_bound_alone_is_not_passed_over():
    row = {name: value for name, value in BOUNDED.items() if name != "end_message"}
    with pytest.raises(DataError, match="column `end_message`: the column is missing"):
        read(row)
    with pytest.raises(DataError, match="Did you mean `end_message`"):
        read({**row, "end_mesage": 6})


def test_two_misspelt_bounds_are_not_passed_over():
    with pytest.raises(DataError, match=r"column `start_mesage`: .*Did you mean `start_message`"):
        read({"chosen": WON, "rejected": LOST, "start_mesage": 4, "end_mesage": 6})
    one = {"chosen": WON[:-1], "rejected": LOST[:-1], "start_message_id": 4}
    assert load_examples(DataSpec(rows=[one])).report.notes == {}


def test_the_report_counts_what_was_cut_and_segments_that_are_shorter_than_their_bounds():
    whole = {**BOUNDED, "chosen": WON[:-1], "rejected": LOST[:-1], "end_message": 8}
    short = {**whole, "rejected": LOST[:5]}
    notes = load_examples(DataSpec(rows=[whole, BOUNDED, short])).report.notes
    assert {kind: tally.places for kind, tally in notes.items()} == {
        "cut_to_bounds": ["rows, row 1", "rows, row 2"],
        "segment_shortened": ["rows, row 2"],
    }


def test_rows_with_bounds_and_rows_without_are_not_mixed():
    with pytest.raises(DataError, match="column `start_message`: the column is missing"):
        read(BOUNDED, {"chosen": WON, "rejected": LOST})


def test_a_turn_that_was_not_the_last_one_was_not_cut_off():
    """What is left after the cut ended by itself."""
    row = {**BOUNDED, "chosen": WON[:-1], "unfinished": ["chosen"]}
    assert read(row).examples[0].unfinished == ()
    (whole,) = read({**row, "rejected": LOST[:-1], "end_message": 8}).examples
    assert whole.unfinished == ("chosen",)
