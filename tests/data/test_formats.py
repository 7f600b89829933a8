"""From raw rows to examples: formats, prompts inside answers, conversations, ids, declared columns, notes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data import DataSpec, Example, check_columns, load_examples, unpair
from prefopt.data.columns import marker_pattern, notes_of
from prefopt.data.formats import make_example
from prefopt.data.messages import split_messages, split_text
from prefopt.errors import DataError

Row = dict[str, Any]


def load(*rows: Any, **rules: Any) -> list[Example]:
    return load_examples(DataSpec(rows=list(rows)), **rules).examples


def turns(*said: str) -> list[Row]:
    """`turns("user: a", "assistant: b")` as messages."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in said]


PAIR = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": turns("user: 2+2?"), "chosen": turns("assistant: 4"), "rejected": turns("assistant: 5")}
LABELLED = {"prompt": "2+2?", "completion": " 4", "label": True}


# Formats


def test_pair_of_texts() -> None:
    (example,) = load({**PAIR, "score_chosen": 0.9, "source": {"id": 3}})
    assert (example.prompt, example.chosen, example.rejected) == ("2+2?", " 4", " 5")
    assert (example.paired, example.kind, example.desirable, example.completion) == (True, "text", None, None)
    assert example.columns == {"score_chosen": 0.9, "source": {"id": 3}}


def test_pair_of_conversations_with_tools() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"default": None}}}}]
    arguments = {"enable_thinking": False}
    (listed,) = load({**CHAT, "tools": tools, "chat_template_kwargs": arguments})
    (written,) = load({**CHAT, "tools": json.dumps(tools), "chat_template_kwargs": arguments})
    assert listed.kind == "chat"
    assert listed.tools == written.tools == tools
    assert listed.chat_template_kwargs == arguments
    assert listed.example_id == written.example_id
    assert listed.columns == {}


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (False, False), (1, True), (0, False), (1.0, True)])
def test_labelled_answer(label: Any, desirable: bool) -> None:
    (example,) = load({**LABELLED, "label": label})
    assert (example.completion, example.desirable, example.paired) == (" 4", desirable, False)
    assert example.chosen is None and example.rejected is None


def test_an_answer_without_a_label_is_a_good_one_where_no_other_is_read() -> None:
    row = {"prompt": "q", "completion": " a"}
    assert [example.desirable for example in load(row, {**row, "label": 0}, unlabelled=True)] == [True, False]
    with pytest.raises(DataError, match="Did you mean `label`"):
        load({**row, "labels": False}, unlabelled=True)
    with pytest.raises(DataError, match="column `label`: the column is missing"):
        load(row)


def test_label_column_of_a_pair_is_an_ordinary_column() -> None:
    (example,) = load({**PAIR, "label": "maths"})
    assert example.columns == {"label": "maths"}


def test_null_tools_and_template_arguments_are_absent() -> None:
    (example,) = load({**CHAT, "tools": None, "chat_template_kwargs": None})
    assert example.tools is None and example.chat_template_kwargs == {}
    assert example.example_id == load(CHAT)[0].example_id


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**CHAT, "tools": "[{"}, "bad_tools"),
        ({**CHAT, "tools": {"name": "add"}}, "bad_tools"),
        ({**CHAT, "tools": ["add"]}, "bad_tools"),
        ({**PAIR, "tools": [{"name": "add"}]}, "bad_tools"),
        ({**CHAT, "chat_template_kwargs": "x"}, "bad_template_kwargs"),
        ({**PAIR, "chat_template_kwargs": {"x": 1}}, "bad_template_kwargs"),
    ],
)
def test_bad_tools_and_template_arguments(row: Row, kind: str) -> None:
    column = "tools" if kind == "bad_tools" else "chat_template_kwargs"
    with pytest.raises(DataError, match=rf"rows, row 1: column `{column}`: .*\({kind}\)"):
        load(CHAT if isinstance(row["prompt"], list) else PAIR, row)


# Kinds that do not mix


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        (PAIR, CHAT, "this row is messages, rows, row 0 is text"),
        (CHAT, PAIR, "this row is text, rows, row 0 is messages"),
        (PAIR, LABELLED, "this row is written as labelled answers, rows, row 0 as pairs"),
        ({"chosen": "a b", "rejected": "a c"}, PAIR, "written as pairs, rows, row 0 as pairs with the prompt inside"),
    ],
)
def test_first_row_that_differs_is_named(first: Row, other: Row, said: str, policy: str) -> None:
    with pytest.raises(DataError, match=r"rows, row 5: .*mixed_kinds") as caught:
        load(*[first] * 5, other, first, on_bad_row=policy)
    assert said in str(caught.value)


def test_text_prompt_beside_conversations_says_what_to_do() -> None:
    row = {**CHAT, "prompt": "2+2?"}
    with pytest.raises(DataError, match=r"row 0: column `prompt`: .*`chosen` is messages.*`columns:`"):
        load(row)


def test_missing_prompt_is_not_taken_for_a_prompt_inside_the_answers() -> None:
    with pytest.raises(DataError, match=r"row 1: column `prompt`: .*missing_column"):
        load(PAIR, {"chosen": "a b", "rejected": "a c"})


def test_unlike_extra_column_is_not_taken_for_a_misspelt_prompt() -> None:
    (example,) = load({"prompt_id": 4, "chosen": "a b", "rejected": "a c"})
    assert (example.prompt, example.columns) == ("a", {"prompt_id": 4})


# Prompts inside the answers


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        ("The sky is", "The sky is blue", ("The sky", " is", " is blue")),
        ("The sky is blue", "The sky is", ("The sky", " is blue", " is")),
        ("yes it is ", "no", ("", "yes it is ", "no")),
        ("Q: a", "Q: b", ("Q:", " a", " b")),
        ("Human: hi\n\nAssistant: ok", "Human: hi\n\nAssistant: okay", ("Human: hi\n\nAssistant:", " ok", " okay")),
        ("one two  three", "one two  four", ("one two", "  three", "  four")),
        ("one two ", "one two", ("one", " two ", " two")),
        ("in side", "in\tside", ("in", " side", "\tside")),
        ("same", "samey", ("", "same", "samey")),
    ],
)
def test_shared_beginning_of_texts(chosen: str, rejected: str, parts: tuple[str, str, str]) -> None:
    """The cut is never inside a word, blanks go to the answers, no answer is left blank, nothing is lost."""
    assert split_text(chosen, rejected) == parts
    prompt, *answers = parts
    assert [prompt + answer for answer in answers] == [chosen, rejected]
    (example,) = load({"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.chosen, example.rejected) == parts


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "", "rejected": "a"}, r"row 1: column `chosen`: .*empty_answer"),
        ({"chosen": "", "rejected": ""}, r"row 1: column `chosen`: .*empty_answer"),
        ({"chosen": "a b", "rejected": "a b"}, r"row 1: column `rejected`: .*identical_pair"),
    ],
)
def test_answers_without_a_difference_are_refused(row: Row, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load({"chosen": "a b", "rejected": "a c"}, row)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_length"),
    [
        ("u q|a a", "u q|a b", 1),
        ("s s|u q|a a", "s s|u q|a b", 2),
        ("u q|a a|u r|a b", "u q|a a|u r|a c", 3),
        ("u q|a a", "u q|a a|u r|a b", 1),
        ("u q|a a|u r|a b", "u q|a a|u t|a b", 1),
    ],
)
def test_shared_beginning_of_conversations(chosen: str, rejected: str, prompt_length: int) -> None:
    """The prompt ends where both go on with an assistant turn; answers are never empty."""
    roles = {"s ": "system: ", "u ": "user: ", "a ": "assistant: "}
    good, bad = (turns(*(roles[turn[:2]] + turn[2:] for turn in said.split("|"))) for said in (chosen, rejected))
    prompt, *answers = split_messages(good, bad)
    assert prompt == good[:prompt_length]
    assert [prompt + answer for answer in answers] == [good, bad]
    (example,) = load({"chosen": good, "rejected": bad})
    assert [example.prompt, example.chosen, example.rejected] == [prompt, *answers]


def test_conversations_without_a_shared_beginning() -> None:
    row = {"chosen": turns("user: a", "assistant: b"), "rejected": turns("user: c", "assistant: d")}
    with pytest.raises(DataError, match=r"row 0: column `rejected`: .*no_common_prompt"):
        load(row)


# Conversations


def test_answers_of_several_turns_pass() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    reply = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "x1"}
    answer = [call, reply, *turns("assistant: 3", "user: sure?", "assistant: yes")]
    (example,) = load({**CHAT, "chosen": answer})
    assert example.chosen == answer


def test_developer_and_system_turns_pass_and_null_fields_do_not_count() -> None:
    prompt = turns("system: s", "developer: d", "user: u")
    (plain,) = load({**CHAT, "prompt": prompt})
    (filled,) = load({**CHAT, "prompt": [{**message, "name": None, "tool_calls": None} for message in prompt]})
    assert plain.prompt == filled.prompt == prompt
    assert plain.example_id == filled.example_id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": turns("user: a", "assistant: b")}, "completion_start"),
        ({"chosen": turns("assistant: a", "user: b")}, "completion_end"),
        ({"chosen": CHAT["prompt"] + CHAT["chosen"]}, r"it repeats the prompt.*completion_start"),
        ({"chosen": turns("assistant: a", "user: b", "assistant:  ")}, r"message 2 .*blank_answer"),
        ({"chosen": turns("gpt: a")}, r"Did you mean `assistant`\?.*unknown_role"),
        ({"prompt": turns("human: a")}, r"Did you mean `user`\?.*unknown_role"),
        ({"prompt": [{"from": "human", "value": "a"}]}, r"it has `from`, `value`.*no_role"),
        ({"prompt": [{"role": "user", "contents": "a"}]}, r"Did you mean `contents`\?.*null_content"),
        ({"prompt": ["hello"]}, r"message 0 is text, not an object.*wrong_type"),
        ({"prompt": [{"role": "tool", "content": None, "tool_calls": [1]}]}, "null_content"),
    ],
)
def test_conversation_rules(change: Row, said: str) -> None:
    (column,) = change
    with pytest.raises(DataError, match=rf"rows, row 1: column `{column}`: .*{said}"):
        load(CHAT, {**CHAT, **change})


# Ids


def test_id_depends_on_the_parts_alone() -> None:
    (first,) = load({**CHAT, "score": 1, "chat_template_kwargs": {"a": 1, "b": 2}})
    swapped = [{name: message[name] for name in reversed(message)} for message in CHAT["prompt"]]
    (second,) = load({"score": 2, **CHAT, "prompt": swapped, "chat_template_kwargs": {"b": 2, "a": 1}})
    assert first.example_id == second.example_id
    assert len(first.example_id) == 16 and int(first.example_id, 16) >= 0


def test_id_is_stable_between_versions() -> None:
    """Caches and held-out sets are addressed by it: a change of this value is a change of the format."""
    assert load(PAIR)[0].example_id == "4ed35e5ac5893489"


def test_any_change_of_a_part_changes_the_id() -> None:
    kwargs = {"chat_template_kwargs": {"a": 1}}
    rows = [PAIR, {**PAIR, "prompt": "2+3?"}, {**PAIR, "chosen": " 5", "rejected": " 4"}]
    chats = [CHAT, {**CHAT, **kwargs}, {**CHAT, "tools": [{"name": "add"}]}]
    labelled = [LABELLED, {**LABELLED, "label": False}]
    ids = [example.example_id for group in (rows, chats, labelled) for example in load(*group)]
    assert len(set(ids)) == len(ids)


# Pairs taken apart


def test_unpairing_doubles_a_row_with_its_own_values() -> None:
    rows = [{**CHAT, "tools": [{"name": f"t{index}"}], "margin": index} for index in range(3)]
    single = load(*rows, paired=False)
    assert [example.desirable for example in single] == [True, False] * 3
    assert [example.columns["margin"] for example in single] == [0, 0, 1, 1, 2, 2]
    assert [example.tools for example in single] == [[{"name": f"t{index // 2}"}] for index in range(6)]
    assert single[0].completion == CHAT["chosen"] and single[1].completion == CHAT["rejected"]
    assert len({example.example_id for example in single}) == 6


def test_taken_apart_equals_written_apart() -> None:
    good, bad = unpair(load(PAIR)[0])
    written = load({**LABELLED, "label": 1}, {**LABELLED, "completion": " 5", "label": 0})
    assert [good.example_id, bad.example_id] == [example.example_id for example in written]


def test_single_answers_cannot_be_paired() -> None:
    with pytest.raises(DataError, match=r"rows, row 0: .*labelled answer.*a pair \(chosen, rejected\) is needed"):
        load(LABELLED, paired=True)


# Declared columns


def example(**columns: Any) -> Example:
    row: Row = {**PAIR, **columns}
    return load(row)[0]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("offset", float("-inf"), "not_finite"),
        ("offset", True, "not_a_number"),
        ("offset", "1", "not_a_number"),
        ("offset", [1.0], "not_a_number"),
        ("preference", 1.0001, "out_of_range"),
        ("preference", -0.1, "out_of_range"),
        ("preference", float("nan"), "not_finite"),
        ("weight", -1, "out_of_range"),
        ("target", "", "empty_answer"),
        ("target", turns("assistant: a"), "wrong_type"),
        ("segments", 2, "segment_bounds"),
        ("segments", 0, "segment_bounds"),
        ("segments", {"chosen": [0]}, "segment_bounds"),
        ("segments", {"chosen": [0], "rejected": [-1]}, "segment_bounds"),
        ("segments", {"chosen": [0], "rejected": []}, "segment_bounds"),
    ],
)
def test_bad_declared_value(name: str, value: Any, kind: str) -> None:
    for required, optional in (((name,), ()), ((), (name,))):
        (problem,) = check_columns([example(**{name: value})], required, optional)
        assert (problem.kind, problem.column, str(problem.where)) == (kind, name, "rows, row 0")


@pytest.mark.parametrize(
    ("name", "value"),
    [("offset", -3), ("preference", 0), ("preference", 1.0), ("weight", 0.0), ("target", " t"), ("segments", 1)],
)
def test_good_declared_value(name: str, value: Any) -> None:
    assert check_columns([example(**{name: value})], (name,)) == []


def test_undeclared_columns_are_not_judged() -> None:
    assert check_columns([example(offset=float("nan"))], ()) == []


def test_missing_declared_column_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"column `score_chosen`: .*Did you mean `scores_chosen`\?.*missing_column"):
        load({**PAIR, "scores_chosen": 1.0}, required_columns=("score_chosen",))


def test_optional_column_is_in_every_row_or_in_none() -> None:
    (problem,) = check_columns([example(weight=1.0), example(weight=None)], (), ("weight",))
    assert (problem.kind, problem.column) == ("missing_column", "weight")
    with pytest.raises(DataError, match=r"rows, row 0: column `weight`: .*rows, row 2 has it.*every row or in none"):
        load(PAIR, PAIR, {**PAIR, "weight": 1.0}, optional_columns=("weight",))
    assert len(load(PAIR, {**PAIR, "weight": None}, optional_columns=("weight",))) == 2


# Notes


def test_answers_that_repeat_the_prompt_are_counted() -> None:
    rows = [{**PAIR, "chosen": f" four {index}"} for index in range(7)]
    rows += [{**PAIR, "chosen": f"2+2? {index}"} for index in range(2)] + [{**PAIR, "rejected": "2+2? 5"}]
    report = load_examples(DataSpec(rows=rows)).report
    assert report.notes["prompt_repeated"].count == 3
    assert report.notes["prompt_repeated"].places == ["rows, row 7", "rows, row 8", "rows, row 9"]


def test_message_that_begins_with_the_question_is_counted() -> None:
    (chat,) = load({**CHAT, "rejected": turns("assistant: 2+2? 5")})
    assert notes_of(chat) == ["prompt_repeated"]


def test_control_markers_in_the_text_are_counted() -> None:
    rows = [PAIR, {**PAIR, "prompt": "<|user|>2+2?"}, {**PAIR, "chosen": " 4</s>"}]
    report = load_examples(DataSpec(rows=rows), special_tokens=["<|user|>", "</s>", ""]).report
    assert report.notes["control_markers"].places == ["rows, row 1", "rows, row 2"]
    (chat,) = load({**CHAT, "chosen": turns("assistant: a <|user|>")})
    assert notes_of(chat, marker_pattern(["<|user|>"])) == ["control_markers"]
    assert notes_of(chat) == []


def test_empty_prompt_passes_with_a_note() -> None:
    report = load_examples(DataSpec(rows=[{**PAIR, "prompt": ""}])).report
    assert report.notes["empty_prompt"].count == 1


def test_equal_rows_are_kept_and_counted() -> None:
    loaded = load_examples(DataSpec(rows=[PAIR, PAIR, {**PAIR, "prompt": "3+3?"}, {**PAIR, "extra": 1}]))
    assert len(loaded.examples) == 4
    assert loaded.report.notes["duplicate_rows"].places == ["rows, row 1", "rows, row 3"]


def test_half_characters_in_memory_do_not_break_the_id() -> None:
    where = load(PAIR)[0].where
    made = make_example("a", where=where, columns={}, chosen=" b", rejected=" c", tools=[{"name": "\ud800"}])
    assert len(made.example_id) == 16
