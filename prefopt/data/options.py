"""What a row says beside its texts: label, tools, template arguments, answers that were cut off.

Every function raises `Flaw` for a value that breaks a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.data.json_rows import parse_json
from prefopt.data.problems import Flaw, kind_of, shown


def label_of(value: Any) -> bool:
    """Whether an answer is a good one."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise Flaw("bad_label", f"the label is {shown(value)}, neither true nor false", "label")
    return bool(value)


def unfinished_of(value: Any, answers: Sequence[str]) -> tuple[str, ...]:
    """Which of the `answers` were cut off, sorted."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(name in answers for name in value):
        names = ", ".join(f"`{name}`" for name in answers)
        raise Flaw("bad_unfinished", f"the value is {shown(value)}, not a list of answers ({names})", "unfinished")
    return tuple(sorted(set(value)))


def tools_of(value: Any, chat: bool) -> list[Any] | None:
    """The tools of a conversation."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except Flaw as flaw:
            raise Flaw("bad_tools", f"the text is not JSON: {flaw.message}", "tools") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Flaw("bad_tools", "the value is not a list of objects", "tools")
    if value and not chat:
        raise Flaw("bad_tools", "tools go with messages, and this row is text", "tools")
    return value or None


def template_kwargs_of(value: Any, chat: bool) -> dict[str, Any]:
    """What is handed to the template of a conversation."""
    column = "chat_template_kwargs"
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise Flaw("bad_template_kwargs", f"the value is {kind_of(value)}, not an object", column)
    if value and not chat:
        raise Flaw("bad_template_kwargs", "template arguments go with messages, and this row is text", column)
    return dict(value)
