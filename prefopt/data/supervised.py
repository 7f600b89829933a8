"""Rows of supervised data, `prompt` and `completion` or `messages`, as the labelled answers that the formats know.

Rows of prompts are read in the same way, for procedures that need no answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefopt.data.formats import refuse_misspelt
from prefopt.data.problems import BadRow, Flaw, RawRow


def as_supervised(row: RawRow) -> RawRow:
    """The row as a desirable answer, where it is written without a label; every other row as it is.

    `messages` is a whole conversation whose last turn is the answer; a `prompt` beside it repeats its beginning.
    Raises `BadRow` where it ends otherwise, or the label is misspelt.
    """
    try:
        return replace(row, values=_labelled(row.values))
    except Flaw as flaw:
        raise BadRow(flaw.at(row.where)) from None


def as_prompt(row: RawRow) -> RawRow:
    """The row as a prompt alone, with a stand-in where its answers were; one without a prompt as it is.

    Of `messages`, an answer at the end is left out.
    """
    values = row.values
    if isinstance(values.get("messages"), list) and "completion" not in values:
        messages = values["messages"]
        last = messages[-1] if messages else None
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        values = {**values, "prompt": messages[:-1] if answered else messages}
    if "prompt" not in values:
        return row
    answer: Any = "." if isinstance(values["prompt"], str) else [{"role": "assistant", "content": "."}]
    kept = {name: value for name, value in values.items() if name in ("prompt", "tools", "chat_template_kwargs")}
    return replace(row, values={**kept, "completion": answer, "label": True})


def _labelled(values: dict[str, Any]) -> dict[str, Any]:
    if "messages" in values and not {"completion", "chosen"} & values.keys():
        return _split(values)
    if "completion" not in values or values.get("label") is not None:
        return values
    refuse_misspelt(values, "label")
    return {**values, "label": True}


def _split(values: dict[str, Any]) -> dict[str, Any]:
    messages = values["messages"]
    rest = {name: value for name, value in values.items() if name not in ("messages", "prompt")}
    if not isinstance(messages, list) or len(messages) < 2:
        raise Flaw("wrong_type", "a conversation needs a turn of the user and an answer", "messages")
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") in ("user", "system", "developer", "tool"):
        raise Flaw("completion_end", f"the conversation ends with a {last['role']} message", "messages")
    return {**rest, "prompt": messages[:-1], "completion": [last], "label": True}
