"""Nodes -> the fields of a section dataclass, with their types, choices and ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from prefopt.errors import nearest
from prefopt.recipe.problems import Problems
from prefopt.recipe.tree import Node
from prefopt.recipe.values import Mismatch, convert


def read_section(
    section: type, entries: Mapping[str, Node], problems: Problems, *, inside: str = "", besides: Collection[str] = ()
) -> dict[str, Any]:
    """The written fields of one section dataclass. With `inside`, the name of its block, other names are refused."""
    hints = get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section) if field.name not in besides}
    read: dict[str, Any] = {}
    for name, node in entries.items():
        path = f"{inside}.{name}" if inside else name
        if name in fields:
            before = len(problems)
            value = read_value(path, node, hints[name], problems)
            _check_field(path, value, node, fields[name].metadata, problems)
            if len(problems) == before:
                read[name] = value
        elif inside:
            known = f"Known: {', '.join(fields)}."
            problems.add(node.place, path, f"there is no such setting.{nearest(name, fields)} {known}")
    return read


def read_value(path: str, node: Node, hint: Any, problems: Problems) -> Any:
    """The converted value, or None with a problem noted."""
    try:
        return convert(node, hint)
    except Mismatch as mismatch:
        problems.add(mismatch.node.place, f"{path}.{mismatch.path}" if mismatch.path else path, mismatch.reason)
    return None


def _check_field(path: str, value: Any, node: Node, metadata: Mapping[str, Any], problems: Problems) -> None:
    if value is None:
        return
    choices, within = metadata.get("choices"), metadata.get("range")
    if choices and value not in choices:
        problems.add(node.place, path, f"`{value}` is not one of {', '.join(choices)}.{nearest(value, choices)}")
    reason = within.problem(value) if within else None
    if reason:
        problems.add(node.place, path, f"{reason}.")
