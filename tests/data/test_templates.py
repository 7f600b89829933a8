"""Where turns begin and end, for templates that behave and for templates that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from prefopt.data.formats import Example
from prefopt.data.problems import Where
from prefopt.data.tokenization import TokenizedData, TokenSettings, tokenize_examples
from prefopt.errors import DataError
from tests.helpers import make_tokenizer

HEAD = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
LAST = "(loop.last and m['role'] == 'assistant')"

PLAIN = HEAD + "{{ m['content'] + '</s>' }}{% endfor %}" + GENERATE
THINK_IN_LAST = (
    HEAD + "{% if " + LAST + " %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '</s>' }}{% endfor %}" + GENERATE
)
STRIPS_HISTORY = (
    HEAD + "{% if " + LAST + " %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '</s>' }}{% endfor %}" + GENERATE
)
NEWLINES = (
    HEAD
    + "{{ '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ADDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|system|>be kind</s>' }}{% endif %}" + PLAIN
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}"
    "{% endfor %}" + GENERATE
)
OPEN_TAG = (
    HEAD
    + "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
EMPTY_THOUGHT = OPEN_TAG.replace("<think>", "<think></think>")
NO_MARKER = HEAD + "{{ m['content'] }}{% endfor %}" + GENERATE


def message(role: str, content: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


def user(content: str) -> dict[str, Any]:
    return message("user", content)


def assistant(content: str | None, **extra: Any) -> dict[str, Any]:
    return message("assistant", content, **extra)


def tokenizer_with(template: str, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def pair(
    prompt: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], **more: Any
) -> Example:
    return Example("0" * 16, prompt, chosen, rejected, where=Where("chats.jsonl", 7, 8), **more)


def run(template: str, example: Example, **settings: Any) -> tuple[PreTrainedTokenizerFast, TokenizedData]:
    tokenizer = tokenizer_with(template)
    return tokenizer, tokenize_examples([example], tokenizer, TokenSettings(**settings))


def shown(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], side: str = "chosen") -> tuple[str, str, str]:
    """Prompt, answer, and the answer with every token that is not scored written as a dot."""
    ids, scored = row[f"{side}_ids"], row[f"{side}_scored"]
    marked = "".join(tokenizer.decode([token]) if flag else "." for token, flag in zip(ids, scored, strict=True))
    return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(ids), marked


SIMPLE = pair([user("the cat")], [assistant("sat")], [assistant("saw a mat")])
TURNS = [assistant("sat on"), user("a mat and"), assistant("saw two birds")]
MULTI = pair([user("the cat")], TURNS, [assistant("fly")])


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        (PLAIN, "<|user|>the cat</s><|assistant|>", "sat</s>"),
        (THINK_IN_LAST, "<|user|>the cat</s><|assistant|>", "<think></think>sat</s>"),
        (STRIPS_HISTORY, "<|user|>the cat</s><|assistant|>", "sat</s>"),
        (NEWLINES, "<|user|>\nthe cat</s>\n<|assistant|>\n", "sat</s>"),
        (ADDS_SYSTEM, "<|system|>be kind</s><|user|>the cat</s><|assistant|>", "sat</s>"),
        (ALTERNATES, "<|user|>the cat</s><|assistant|>", "sat</s>"),
        (OPEN_TAG, "<|user|>the cat</s><|assistant|><think>", "sat</s>"),
        (EMPTY_THOUGHT, "<|user|>the cat</s><|assistant|><think></think>", "sat</s>"),
        (NO_MARKER, "<|user|>the cat<|assistant|>", "sat</s>"),
    ],
)
def test_scored_text_of_a_single_answer(template, prompt, chosen):
    tokenizer, data = run(template, SIMPLE)
    assert shown(tokenizer, data.rows[0]) == (prompt, chosen, chosen)


@pytest.mark.parametrize(
    ("template", "chosen", "scored"),
    [
        (PLAIN, "sat on</s><|user|>a mat and</s><|assistant|>saw two birds</s>", ("sat on</s>", "saw two birds</s>")),
        (
            THINK_IN_LAST,
            "sat on</s><|user|>a mat and</s><|assistant|><think></think>saw two birds</s>",
            ("sat on</s>", "<think></think>saw two birds</s>"),
        ),
        (
            NEWLINES,
            "sat on</s>\n<|user|>\na mat and</s>\n<|assistant|>\nsaw two birds</s>",
            ("sat on</s>", "saw two birds</s>"),
        ),
        (
            ADDS_SYSTEM,
            "sat on</s><|user|>a mat and</s><|assistant|>saw two birds</s>",
            ("sat on</s>", "saw two birds</s>"),
        ),
        (NO_MARKER, "sat on<|user|>a mat and<|assistant|>saw two birds</s>", ("sat on", "saw two birds</s>")),
    ],
)
def test_only_the_assistants_turns_are_scored(template, chosen, scored):
    tokenizer, data = run(template, MULTI)
    _, text, marked = shown(tokenizer, data.rows[0])
    assert text == chosen
    assert tuple(part for part in marked.split(".") if part) == scored


def test_thoughts_left_out_of_earlier_turns_are_neither_read_nor_scored_there():
    answer = [assistant("<think>on</think>sat"), user("a mat"), assistant("<think>over</think>saw")]
    tokenizer, data = run(STRIPS_HISTORY, pair([user("the cat")], answer, [assistant("fly")]))
    _, text, marked = shown(tokenizer, data.rows[0])
    assert text == "sat</s><|user|>a mat</s><|assistant|><think>over</think>saw</s>"
    assert [part for part in marked.split(".") if part] == ["sat</s>", "<think>over</think>saw</s>"]


def test_scored_tokens_agree_with_the_templates_own_generation_blocks():
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
        + GENERATE
    )
    tokenizer, data = run(template, MULTI)
    told = tokenizer.apply_chat_template([user("the cat"), *TURNS], return_assistant_tokens_mask=True)
    row = data.rows[0]
    assert [*row["prompt_ids"], *row["chosen_ids"]] == told["input_ids"]
    assert [0] * len(row["prompt_ids"]) + row["chosen_scored"].astype(int).tolist() == told["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, NEWLINES, OPEN_TAG])
def test_the_assistant_header_belongs_to_the_prompt(template):
    tokenizer, data = run(template, SIMPLE)
    prompt, answer, _ = shown(tokenizer, data.rows[0])
    assert "<|assistant|>" in prompt and "<|assistant|>" not in answer


# Prompts that are not the beginning of the whole conversation


@pytest.mark.parametrize(("template", "left"), [(OPEN_TAG, "<think>"), (EMPTY_THOUGHT, "<think></think>")])
def test_a_prompt_rendered_differently_is_counted_and_used_unless_told_otherwise(template, left):
    tokenizer, data = run(template, SIMPLE)
    assert data.report.noted["prompt_not_prefix"].places == ["chats.jsonl:8"]
    assert shown(tokenizer, data.rows[0])[0].endswith("<|assistant|>" + left)
    tokenizer, data = run(template, SIMPLE, prompt_boundary="common_prefix")
    assert data.report.noted["prompt_not_prefix"].count == 1
    assert shown(tokenizer, data.rows[0]) == ("<|user|>the cat</s><|assistant|>", "sat</s>", "sat</s>")


def test_an_answer_that_begins_like_the_thought_keeps_its_first_letter():
    example = pair([user("the cat")], [assistant("<b>sat</b>")], [assistant("<b>saw</b>")])
    for boundary in ("generation_prompt", "common_prefix"):
        tokenizer, data = run(EMPTY_THOUGHT, example, prompt_boundary=boundary)
        assert shown(tokenizer, data.rows[0])[2] == "<b>sat</b></s>"


def test_tokens_that_merge_over_the_border():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: the ca' }}{% endif %}"
    example = pair([user("on")], [assistant("the cat sat")], [assistant("the car")])
    tokenizer, data = run(template, example)
    row = data.rows[0]
    assert row["prompt_ids"].tolist() == tokenizer("user: on</s>assistant: the ca")["input_ids"]
    assert shown(tokenizer, row)[1:] == ("t sat</s>", "t sat</s>") and shown(tokenizer, row, "rejected")[1] == "r</s>"
    assert data.report.noted["prompt_not_prefix"].count == 1
    tokenizer, data = run(template, example, prompt_boundary="common_prefix")
    row = data.rows[0]
    for side, messages in (("chosen", example.chosen), ("rejected", example.rejected)):
        whole = tokenizer.apply_chat_template([*example.prompt, *messages])["input_ids"]
        assert [*row["prompt_ids"], *row[f"{side}_ids"]] == whole and row[f"{side}_scored"].all()


@pytest.mark.parametrize(
    ("template", "example", "verb"),
    [
        ("{{ messages[-1]['content'] }}" + PLAIN, SIMPLE, "begins"),
        ("{{ messages[-1]['content'] | length }}" + PLAIN, SIMPLE, "begins"),
        (HEAD + "{{ m['content'] }}{% if " + LAST + " %}{{ '</s>' }}{% endif %}{% endfor %}" + GENERATE, MULTI, "ends"),
    ],
)
def test_a_rewritten_conversation_is_refused_not_guessed(template, example, verb):
    with pytest.raises(DataError, match=rf"chats\.jsonl:8, chosen.*cannot tell where an assistant turn {verb}"):
        run(template, example)


# End markers


@pytest.mark.parametrize("template", [PLAIN, NEWLINES])
def test_the_templates_end_marker_is_the_only_one_and_the_last_scored_token(template):
    _, data = run(template, SIMPLE)
    row = data.rows[0]
    assert row["chosen_ids"].tolist().count(2) == 1 and row["chosen_ids"][-1] == 2 and row["chosen_scored"][-1]
    assert "eos_appended" not in data.report.noted


def test_a_template_without_end_marker_gets_one_and_it_is_counted():
    for answer in ("sat", ">", "sat\n"):
        _, data = run(NO_MARKER, pair([user("the")], [assistant(answer)], [assistant("saw a mat")]))
        assert data.rows[0]["chosen_ids"].tolist().count(2) == 1 and data.rows[0]["chosen_ids"][-1] == 2
        assert data.report.noted["eos_appended"].count == 1


def test_an_end_marker_in_plain_text_is_a_marker_too():
    template = HEAD + "{{ m['content'] + ' <end>\\n' }}{% endfor %}" + GENERATE
    for answer in ("sat", ">", "<end>"):
        tokenizer, data = run(template, pair([user("the")], [assistant(answer)], [assistant("saw a mat")]))
        assert shown(tokenizer, data.rows[0])[2] == f"{answer} <end>"
        assert not data.report.noted


# What reaches the template


def test_tools_and_arguments_reach_the_template_and_a_rows_own_win():
    template = (
        "{% if tools %}{{ '<|tool|>' + tools[0]['name'] }}{% endif %}{{ tone }}"
        + HEAD
        + "{{ m['content'] or '' }}{% for call in m.get('tool_calls', []) %}{{ call['function']['name'] }}{% endfor %}"
        + "{{ '</s>' }}{% endfor %}"
        + GENERATE
    )
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    answer = [assistant(None, tool_calls=call), message("tool", "a mat"), assistant("on a mat")]
    example = pair([user("the cat")], answer, [assistant("fly")], tools=[{"name": "look"}])
    tokenizer, data = run(template, example, chat_template_kwargs={"tone": "red"})
    prompt, text, marked = shown(tokenizer, data.rows[0])
    assert prompt == "<|tool|>lookred<|user|>the cat</s><|assistant|>"
    assert text == "look</s><|tool|>a mat</s><|assistant|>on a mat</s>"
    assert [part for part in marked.split(".") if part] == ["look</s>", "on a mat</s>"]
    own = pair([user("the cat")], answer, [assistant("fly")], chat_template_kwargs={"tone": "near"})
    tokenizer, data = run(template, own, chat_template_kwargs={"tone": "red"})
    assert shown(tokenizer, data.rows[0])[0].startswith("near<|user|>")


def test_a_template_that_refuses_names_the_row_the_column_and_the_roles():
    example = pair(
        [user("the cat")], [assistant("sat"), message("tool", "a"), user("b"), assistant("saw")], [assistant("x")]
    )
    with pytest.raises(DataError, match=r"chats\.jsonl:8, chosen.*assistant, tool, user.*roles must alternate"):
        run(ALTERNATES, example)
    with pytest.raises(DataError, match=r"chats\.jsonl:8, prompt.*system, user"):
        run(ALTERNATES, pair([message("system", "be"), user("the")], [assistant("sat")], [assistant("saw")]))


def test_an_argument_that_clashes_names_the_row():
    with pytest.raises(DataError, match=r"chats\.jsonl:8.*tokenize"):
        run(PLAIN, SIMPLE, chat_template_kwargs={"tokenize": True})


def test_cutting_a_conversation_keeps_flags_and_ids_together():
    _, data = run(PLAIN, MULTI)
    whole = data.rows[0]
    limit = len(whole["prompt_ids"]) + len(whole["chosen_ids"]) - 2
    _, cut = run(PLAIN, MULTI, max_length=limit)
    row = cut.rows[0]
    assert np.array_equal(row["chosen_ids"], whole["chosen_ids"][:-2])
    assert np.array_equal(row["chosen_scored"], whole["chosen_scored"][:-2])
    assert cut.report.noted["eos_cut"].count == 1


def test_no_row_depends_on_the_rows_before_it():
    """A template that ends some turns with a full stop, and an answer that ends with one of its own."""
    closes = HEAD + "{{ m['content'] }}{% if messages[0]['content'] == 'close' %}.{% endif %}{% endfor %}" + GENERATE
    tokenizer = tokenizer_with(closes)
    closed = pair([user("close")], [assistant("sat")], [assistant("saw")])
    other = pair([user("the cat")], [assistant("sat.")], [assistant("saw.")])
    (alone,) = tokenize_examples([other], tokenizer, TokenSettings()).rows
    _, after = tokenize_examples([closed, other], tokenizer, TokenSettings()).rows
    assert shown(tokenizer, alone) == shown(tokenizer, after)
    assert alone["chosen_ids"][-1] == tokenizer.eos_token_id
