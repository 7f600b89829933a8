"""Turns and segments: what a row may say, and the lists over tokens that come of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from prefopt.data import DataSpec, load_examples
from prefopt.data.collation import Collator
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.data.turns import token_weights, turn_of_tokens
from prefopt.errors import DataError
from tests.helpers import make_tokenizer

DECLARED = {"optional_columns": ("segments", "turn_weights"), "paired": True}
TOKENIZER = make_tokenizer()


def said(*turns: str) -> list[dict[str, Any]]:
    """Messages written "u the cat": u user, a assistant, t tool, s system."""
    roles = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


ROW = {
    "prompt": said("s near", "u the cat", "a sat", "u on"),
    "chosen": said("a a mat", "u and saw", "a two red birds", "t over", "a fly"),
    "rejected": said("a old stone", "u walls", "a quiet", "u river", "a banks at dawn"),
}


def load(*rows: dict[str, Any], **rules: Any):
    return load_examples(DataSpec(rows=list(rows)), **{**DECLARED, **rules}).examples


def tokens(*rows: dict[str, Any], columns=("segments", "turn_weights"), turns=True, **settings: Any):
    return tokenize_examples(load(*rows), TOKENIZER, TokenSettings(**settings), optional_columns=columns, turns=turns)


def words(ids) -> str:
    return TOKENIZER.decode(ids)


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_the_turn_of_each_scored_token():
    scored = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1, 0], dtype=bool)
    assert turn_of_tokens(scored).tolist() == [0, 0, 1, 2, 2, 2]
    assert turn_of_tokens(scored[2:]).tolist() == [0, 1, 1, 1]
    assert turn_of_tokens(scored[:0]).tolist() == [] and turn_of_tokens(~scored[:2]).tolist() == []
    assert token_weights(scored, [1.0, 0.0, 0.5]).tolist() == [1, 1, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0]


def test_masks_and_turns_are_those_of_the_session():
    """Each turn's tokens, end marker included, are the assistant's words; nothing of user and tool is among them."""
    (row,) = tokens(ROW).rows
    for side in ("chosen", "rejected"):
        ids, scored = row[f"{side}_ids"], row[f"{side}_scored"]
        turn = turn_of_tokens(scored)
        spoken = [message["content"] for message in ROW[side] if message["role"] == "assistant"]
        assert [words(ids[scored][turn == number]) for number in range(3)] == [text + "</s>" for text in spoken]
        others = words(ids[~scored])
        assert all(m["content"] in others for m in ROW[side] if m["role"] != "assistant")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, None),
        ({"segments": 1}, ([1, 0, 0], [1, 0, 0])),
        ({"segments": 3}, ([1, 1, 1], [1, 1, 1])),
        ({"segments": {"chosen": [0, 2], "rejected": [1, 2]}}, ([1, 0, 1], [0, 1, 1])),
        ({"turn_weights": {"chosen": [1, 0.5, 0], "rejected": [2, 1, 1]}}, ([1, 0.5, 0], [2, 1, 1])),
        ({"segments": 2, "turn_weights": {"chosen": [1, 0.5, 9], "rejected": [2, 1, 9]}}, ([1, 0.5, 0], [2, 1, 0])),
    ],
)
def test_a_segment_is_a_weight_for_each_token(columns, expected):
    (row,) = tokens({**ROW, **columns}).rows
    for number, side in enumerate(("chosen", "rejected")):
        if expected is None:
            assert f"{side}_segment" not in row
            continue
        scored, weight = row[f"{side}_scored"], row[f"{side}_segment"]
        assert weight[scored].tolist() == [expected[number][turn] for turn in turn_of_tokens(scored)]
        assert not weight[~scored].any()


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_holds_turns_and_weights_in_the_order_of_its_tokens(shared):
    other = {**ROW, "chosen": ROW["chosen"][:3], "rejected": ROW["rejected"][:3], "segments": 1}
    rows = tokens({**ROW, "segments": {"chosen": [2], "rejected": [0]}}, other).rows
    batch = Collator(turns=True, shared=shared)(rows)
    parts = [(rows[index], side) for side in ("chosen", "rejected") for index in (0, 1)]
    assert batch["turn"].tolist() == [t for row, side in parts for t in turn_of_tokens(row[f"{side}_scored"])]
    assert batch["segment"].tolist() == [
        w for row, side in parts for w in row[f"{side}_segment"][row[f"{side}_scored"]]
    ]
    assert len(batch["turn"]) == len(batch["sequence"]) == len(batch["target"])
    assert "turn" not in Collator(shared=shared)(rows) and "segment" not in Collator(shared=shared)(rows)
    assert Collator(turns=True)([])["turn"].tolist() == []


def test_undeclared_segments_are_not_read():
    (row,) = tokenize_examples(load({**ROW, "segments": 1}), TOKENIZER, TokenSettings(), turns=True).rows
    assert "chosen_segment" not in row


def test_text_answers_are_one_turn():
    (row,) = tokens({"prompt": "the cat", "chosen": " sat", "rejected": " saw", "segments": 1}).rows
    assert set(turn_of_tokens(row["chosen_scored"])) == {0} and row["chosen_segment"].all()


# ---- limits ---------------------------------------------------------------------------------------------------------


def length_of(row, side: str, turns: int) -> int:
    """Tokens up to the first one of turn number `turns`, prompt included."""
    scored = row[f"{side}_scored"]
    return len(row["prompt_ids"]) + int(np.flatnonzero(scored)[turn_of_tokens(scored) == turns][0])


@pytest.mark.parametrize("columns", [{}, {"segments": 3}])
def test_a_row_that_loses_a_turn_that_counts_is_left_out(columns):
    (whole,) = tokens(ROW).rows
    limit = length_of(whole, "rejected", 2)
    data = [
        {**ROW, **columns},
        {**ROW, "chosen": said("a a"), "rejected": said("a b"), **({"segments": 1} if columns else {})},
    ]
    found = tokens(*data, max_length=limit, max_dropped=1.0)
    assert len(found.rows) == 1 and found.report.dropped["turn_lost"].count == 1
    with pytest.raises(DataError, match=r"1 of 2 rows are lost to the length limit .*turn_lost: 1 \(rows, row 0"):
        tokens(*data, max_length=limit)


def test_a_turn_outside_the_segment_may_be_cut():
    (whole,) = tokens(ROW).rows
    limit = min(length_of(whole, side, 2) for side in ("chosen", "rejected"))
    (row,) = tokens({**ROW, "segments": 2}, max_length=limit).rows
    assert row["chosen_segment"].any() and row["rejected_segment"].any()


def test_a_turn_cut_short_still_counts_and_is_noted_as_any_cut():
    (whole,) = tokens(ROW).rows
    found = tokens(ROW, max_length=1 + max(length_of(whole, side, 2) for side in ("chosen", "rejected")))
    assert found.rows and found.report.noted.keys() & {"eos_cut", "eos_cut_one_sided"}


def test_where_no_segments_are_asked_for_a_lost_turn_is_noted():
    (whole,) = tokens(ROW).rows
    limit = length_of(whole, "rejected", 2)
    found = tokens(ROW, columns=(), max_length=limit)
    assert found.rows and found.report.noted["turns_cut"].count == 1
    assert "turns_cut" not in tokens(ROW, columns=(), turns=False, max_length=limit).report.noted


def test_turns_that_a_template_runs_together_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = {"prompt": said("u the"), "chosen": said("a a", "u ", "a b"), "rejected": said("a c", "u ", "a d")}
    with pytest.raises(DataError, match="chosen: 2 assistant turns are 1 runs of scored tokens"):
        tokenize_examples(load(row), tokenizer, TokenSettings(), turns=True)


# ---- what a row may say ---------------------------------------------------------------------------------------------

EQUAL = {side: [1, 1, 1] for side in ("chosen", "rejected")}
BAD = [
    ({"segments": 4}, "segment_bounds", "segments", "4 lies outside|outside `chosen`, which has 3 assistant turns"),
    ({"segments": {"chosen": [0, 3], "rejected": [0, 1]}}, "segment_bounds", "segments", "outside `chosen`"),
    ({"segments": {"chosen": [0, 0], "rejected": [0, 1]}}, "segment_bounds", "segments", "do not rise"),
    ({"segments": {"chosen": [1, 0], "rejected": [0, 1]}}, "segment_bounds", "segments", "do not rise"),
    ({"segments": {"chosen": [True], "rejected": [0]}}, "segment_bounds", "segments", "outside `chosen`"),
    ({"segments": {"chosen": [0.5], "rejected": [0]}}, "segment_bounds", "segments", "outside `chosen`"),
    ({"segments": True}, "segment_bounds", "segments", "neither a number of turns"),
    ({"segments": {"chosen": [0, 1], "rejected": [0]}}, "unequal_turns", "segments", "2 assistant turns .* and 1 in"),
    ({"chosen": ROW["chosen"][:3]}, "unequal_turns", "segments", "2 assistant turns count in `chosen` and 3"),
    ({"turn_weights": {"chosen": [1], "rejected": [1, 1, 1]}}, "turn_weights", "turn_weights", "is not 3 weights"),
    ({"turn_weights": {**EQUAL, "chosen": [1, -1, 1]}}, "turn_weights", "turn_weights", "numbers from 0 on"),
    ({"turn_weights": {**EQUAL, "chosen": [1, True, 1]}}, "turn_weights", "turn_weights", "numbers from 0 on"),
    ({"turn_weights": [1, 1, 1]}, "turn_weights", "turn_weights", "lists of weights"),
    ({"turn_weights": {**EQUAL, "rejected": [0, 0, 1]}, "segments": 2}, "turn_weights", "turn_weights", "more than 0"),
    ({"rejected": [ROW["chosen"][0], *ROW["rejected"][1:]]}, "same_first_turn", "rejected", "begin with the same turn"),
    ({"chosen": ROW["chosen"][:4]}, "completion_end", "chosen", "ends with a tool message"),
    ({"chosen": ROW["chosen"][1:]}, "completion_start", "chosen", "begins with a user message"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "column", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_row_is_refused_by_file_line_and_field(tmp_path, change, kind, column, message):
    file = tmp_path / "sessions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, **change})))
    spec = DataSpec(data_files=str(file))
    with pytest.raises(DataError, match=rf"(?s)sessions\.jsonl:2: column `{column}`: .*({message}).*\({kind}\)\. \w"):
        load_examples(spec, **DECLARED)
    report = load_examples(spec, **DECLARED, on_bad_row="skip").report
    assert (report.bad_rows, list(report.problems)) == (1, [kind])


def test_unequal_segments_are_taken_when_allowed():
    row = {**ROW, "segments": {"chosen": [0, 1], "rejected": [0]}}
    assert load(row, unequal_segments=True)
    with pytest.raises(DataError, match="allow_unequal_segments: true"):
        load(row)


def test_losses_that_ask_for_no_segments_take_any_number_of_turns():
    row = {**ROW, "rejected": [ROW["chosen"][0], *ROW["rejected"][1:3]]}
    assert load(row, optional_columns=())


def test_the_prompt_may_stand_inside_the_answers():
    """Two whole sessions: what they share is the prompt, and turns count from where they part."""
    whole = {side: [*ROW["prompt"], *ROW[side]] for side in ("chosen", "rejected")}
    (example,) = load({**whole, "segments": 2})
    assert example.prompt == ROW["prompt"] and example.chosen == ROW["chosen"]
