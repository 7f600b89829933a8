"""Conversations: what a list of messages must look like, and where a prompt ends when it is not a column of its own."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from prefopt.data.json_rows import SURROGATE
from prefopt.data.problems import Flaw, kind_of
from prefopt.errors import nearest

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names other projects use, too far from ours for the nearest-name hint.
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}

# Tab, the line ends, form feed and escape appear in honest text; the rest of C0 does not.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def check_text(column: str, text: str) -> None:
    """Refuse half characters and control characters; every other text is kept as it is."""
    if SURROGATE.search(text):
        raise Flaw("lone_surrogate", "the text holds one half of a surrogate pair", column)
    if found := _CONTROL.search(text):
        message = f"the text holds the control character U+{ord(found[0]):04X} at character {found.start() + 1}"
        raise Flaw("control_character", message, column)


def check_messages(column: str, value: list[Any]) -> list[Message]:
    """The messages without their null fields. Raises `Flaw` at the first that breaks a rule."""
    if not value:
        raise Flaw("empty_messages", "the list of messages is empty", column)
    messages = [_check_message(column, index, message) for index, message in enumerate(value)]
    _check_turns(column, messages)
    return messages


def _check_message(column: str, index: int, message: Any) -> Message:
    place = f"message {index}"
    if not isinstance(message, dict):
        raise Flaw("wrong_type", f"{place} is {kind_of(message)}, not an object", column)
    _check_role(column, place, message)
    content = message.get("content")
    if content is None and not (message["role"] == "assistant" and message.get("tool_calls")):
        known = nearest("content", [name for name in message if name != "content"])
        raise Flaw("null_content", f"{place} ({message['role']}) has no content.{known}", column)
    if content is not None and not isinstance(content, str):
        raise Flaw("wrong_type", f"the content of {place} is {kind_of(content)}, not text", column)
    check_text(column, content or "")
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return {"role": message["role"], "content": content, **rest}


def _check_role(column: str, place: str, message: Message) -> None:
    role = message.get("role")
    if role is None:
        keys = ", ".join(f"`{key}`" for key in message) or "no key"
        raise Flaw("no_role", f"{place} has no role (it has {keys})", column)
    if role not in ROLES:
        other = _OTHER_ROLES.get(str(role))
        hint = f" Did you mean `{other}`?" if other else nearest(str(role), ROLES)
        raise Flaw("unknown_role", f"{place} has the role `{role}`, which is not known.{hint}", column)


def _check_turns(column: str, messages: list[Message]) -> None:
    for index, (first, second) in enumerate(pairwise(messages)):
        if first["role"] == second["role"] == "assistant":
            message = f"messages {index} and {index + 1} are both assistant turns"
            raise Flaw("two_assistant_turns", message, column)


def check_answer(column: str, answer: list[Message], prompt: list[Message]) -> None:
    """An answer begins and ends with an assistant turn, leaves none of its turns empty, and continues the prompt."""
    if answer[0]["role"] != "assistant":
        again = " (it repeats the prompt)" if answer[: len(prompt)] == prompt else ""
        raise Flaw("completion_start", f"the answer begins with a {answer[0]['role']} message{again}", column)
    if answer[-1]["role"] != "assistant":
        raise Flaw("completion_end", f"the answer ends with a {answer[-1]['role']} message", column)
    if prompt[-1]["role"] == "assistant":
        raise Flaw("two_assistant_turns", "the prompt ends with an assistant turn, the answer begins with one", column)
    for index, message in enumerate(answer):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            check_not_empty(column, message["content"], f"the assistant turn in message {index}")


def check_not_empty(column: str, text: str, what: str = "the answer") -> None:
    """Refuse an answer without a visible character."""
    if not text:
        raise Flaw("empty_answer", f"{what} is empty", column)
    if text.isspace():
        raise Flaw("blank_answer", f"{what} is nothing but blanks", column)


def is_answer(text: str) -> bool:
    """Whether a data set may hold a sampled text: it has a visible character and nothing that is no text."""
    try:
        check_not_empty("answer", text)
        check_text("answer", text)
    except Flaw:
        return False
    return True


def split_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """`(prompt, chosen, rejected)`: the longest shared beginning after which both go on with an assistant turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for cut in range(shared, 0, -1):
        following = chosen[cut : cut + 1] + rejected[cut : cut + 1]
        if len(following) == 2 and all(message["role"] == "assistant" for message in following):
            return chosen[:cut], chosen[cut:], rejected[cut:]
    message = "both conversations must start with the same messages, up to an assistant turn; they do not"
    raise Flaw("no_common_prompt", message, "rejected")


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """`(prompt, chosen, rejected)`: the longest shared beginning that ends where a word ends in both texts.

    The blank after it goes to the answers, and neither answer is left without a visible character; with no such place
    the prompt is empty.
    """
    for cut in range(_shared_length(chosen, rejected), 0, -1):
        if _word_ends(chosen, cut) and _word_ends(rejected, cut) and chosen[cut:].strip() and rejected[cut:].strip():
            return chosen[:cut], chosen[cut:], rejected[cut:]
    return "", chosen, rejected


def _shared_length(first: str, second: str) -> int:
    shortest = min(len(first), len(second))
    return next((index for index in range(shortest) if first[index] != second[index]), shortest)


def _word_ends(text: str, cut: int) -> bool:
    return cut < len(text) and text[cut].isspace() and not text[cut - 1].isspace()


def contents(part: str | list[Message]) -> list[str]:
    """The texts of a part: itself, or the contents of its messages."""
    return [part] if isinstance(part, str) else [message["content"] for message in part if message["content"]]
