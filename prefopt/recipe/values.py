"""Text -> value, by the type a field declares. YAML 1.1's own guesses (`no`, `1:30`, `0o10`) never decide."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from prefopt.errors import nearest
from prefopt.recipe.tree import NULLS, Items, Node, Text, is_null

TRUE = ("true", "yes", "on")
FALSE = ("false", "no", "off")
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
UNDERSCORED = re.compile(r"[-+]?[0-9][0-9_.eE+-]*_[0-9_.eE+-]*")
OTHER_BASE = re.compile(r"[-+]?0([oOxXbB][0-9a-fA-F_]+|[0-9]+)")
BASE_60 = re.compile(r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?")
DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")
LARGEST_WHOLE = 2**63
LONGEST_WHOLE = len(f"-{LARGEST_WHOLE}")
MAX_LISTED = 16


class Mismatch(Exception):
    """A written value does not fit its field: why and what to write, and the path below the field when nested."""

    def __init__(self, reason: str, node: Node, path: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.path = path

    def below(self, step: str) -> Mismatch:
        """The same, seen from one level further out."""
        return Mismatch(self.reason, self.node, f"{step}.{self.path}" if self.path else step)


def convert(node: Node, hint: Any) -> Any:
    """The value of `node` as the type `hint` asks for. Raises `Mismatch`."""
    options = _options(hint)
    if isinstance(node, Text):
        return _single(node, options)
    wanted: type = list if isinstance(node, Items) else dict
    fitting = [option for option in options if (get_origin(option) or option) in (wanted, Any)]
    if not fitting:
        got = "a list" if isinstance(node, Items) else "a block"
        raise Mismatch(f"expected {expected(options)}, got {got}.", node)
    inner = get_args(fitting[0])
    if isinstance(node, Items):
        return [_inside(item, inner[0] if inner else Any, str(index)) for index, item in enumerate(node.items)]
    return {name: _inside(value, inner[1] if inner else Any, name) for name, value in node.entries.items()}


def untyped(node: Text) -> Any:
    """The value of a text in a block without declared types. What readers of YAML disagree about is refused."""
    text = node.text
    if node.quoted:
        return text
    if text in NULLS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if DECIMAL.fullmatch(text) and not OTHER_BASE.fullmatch(text):
        return number(node)
    if text.lower() in (*TRUE, *FALSE):
        meant = "true" if text.lower() in TRUE else "false"
        raise Mismatch(f'`{text}` is a word to some readers and {meant} to others. Write {meant}, or "{text}".', node)
    if any(form.fullmatch(text) for form in (NOT_FINITE, UNDERSCORED, OTHER_BASE, BASE_60, DATE)):
        reason = f'`{text}` is a number to some readers and text to others. Write a plain number, or "{text}".'
        raise Mismatch(reason, node)
    return text


def number(node: Text) -> int | float:
    """The number a text spells, whole where it is written whole. Raises `Mismatch` saying how to write it."""
    text = node.text
    if node.quoted:
        raise Mismatch(f'expected a number, got the text "{text}". Remove the quotes.', node)
    if OTHER_BASE.fullmatch(text):
        reason = f"`{text}` has a leading zero, which some readers take for another base. Write it in decimal."
        raise Mismatch(reason, node)
    if WHOLE.fullmatch(text):
        return _whole(node)
    if DECIMAL.fullmatch(text):
        return _decimal(node)
    raise Mismatch(_not_a_number(text), node)


def expected(options: tuple[Any, ...]) -> str:
    """What a field takes, in words."""
    words = [_in_words(option) for option in options if option is not NoneType]
    words = list(dict.fromkeys(words))
    return " or ".join(words) + (" or null" if NoneType in options else "")


def _options(hint: Any) -> tuple[Any, ...]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return tuple(option for part in get_args(hint) for option in _options(part))
    if hint is None:
        return (NoneType,)
    return (hint,)


def _inside(node: Node, hint: Any, step: str) -> Any:
    try:
        return convert(node, hint)
    except Mismatch as mismatch:
        raise mismatch.below(step) from None


def _single(node: Text, options: tuple[Any, ...]) -> Any:
    """Try the readings of a text from the narrowest type to the widest."""
    if Any in options or object in options:
        return untyped(node)
    if is_null(node):
        return _null(node, options)
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    if enums:
        return one_of(node, tuple(str(member.value) for member in enums[0]))
    literals = tuple(value for option in options if get_origin(option) is Literal for value in get_args(option))
    if literals and str not in options:
        return _literal(node, literals)
    readings: dict[type, Callable[[Text], Any]] = {bool: _truth, int: _integer, float: number}
    readable = [readings[option] for option in readings if option in options]
    if str in options:
        return _first_fit(node, readable)
    if not readable:
        raise Mismatch(f"expected {expected(options)}, got `{node.text}`.", node)
    return readable[-1](node)


def _first_fit(node: Text, readings: list[Callable[[Text], Any]]) -> Any:
    """The first reading that fits, and the text itself when none does."""
    for reading in readings:
        try:
            return reading(node)
        except Mismatch:
            continue
    return node.text


def _null(node: Text, options: tuple[Any, ...]) -> None:
    if node.text == "None":
        raise Mismatch("`None` is text in a recipe. Write null, or remove the line.", node)
    if NoneType not in options:
        raise Mismatch(f"has no value. Write {expected(options)}, or remove the line.", node)


def one_of(node: Text, choices: tuple[str, ...]) -> str:
    """The text, when it is among the choices. Raises `Mismatch` with the nearest one."""
    if node.text not in choices:
        listed = ", ".join(choices) if len(choices) <= MAX_LISTED else f"the {len(choices)} values transformers knows"
        raise Mismatch(f"`{node.text}` is not one of {listed}.{nearest(node.text, choices)}", node)
    return node.text


def _literal(node: Text, literals: tuple[Any, ...]) -> Any:
    if all(isinstance(value, str) for value in literals):
        return one_of(node, literals)
    value = untyped(node)
    if value not in literals:
        raise Mismatch(f"`{node.text}` is not one of {', '.join(map(str, literals))}.", node)
    return value


def _truth(node: Text) -> bool:
    word = node.text.lower()
    if node.quoted or word not in (*TRUE, *FALSE):
        shown = f'the text "{node.text}"' if node.quoted else f"`{node.text}`"
        raise Mismatch(f"expected true or false, got {shown}.", node)
    return word in TRUE


def _integer(node: Text) -> int:
    try:
        value = number(node)
    except Mismatch as mismatch:
        raise Mismatch(mismatch.reason.replace("a number", "a whole number"), node) from None
    if isinstance(value, float):
        write = f" Write {value:.0f}." if value.is_integer() and abs(value) < LARGEST_WHOLE else ""
        raise Mismatch(f"expected a whole number, got `{node.text}`.{write}", node)
    return value


def _whole(node: Text) -> int:
    # The length is checked first: converting a text of a million digits takes seconds.
    if len(node.text) > LONGEST_WHOLE or abs(int(node.text)) >= LARGEST_WHOLE:
        raise Mismatch(f"`{node.text[:24]}` is too large.", node)
    return int(node.text)


def _decimal(node: Text) -> float:
    value = float(node.text)
    if math.isinf(value):
        raise Mismatch(f"`{node.text}` is too large: it would become infinite.", node)
    if value == 0 and re.search(r"[1-9]", re.split(r"[eE]", node.text)[0]):
        raise Mismatch(f"`{node.text}` is too small: it would become 0.", node)
    return value


def _not_a_number(text: str) -> str:
    if NOT_FINITE.fullmatch(text):
        return f"must be a finite number, not `{text}`."
    if UNDERSCORED.fullmatch(text):
        return f"`{text}` has an underscore. Write {text.replace('_', '')}."
    if BASE_60.fullmatch(text):
        return f"expected a number, got `{text}`, which some readers take for base 60."
    return f"expected a number, got `{text}`."


def _in_words(option: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    names |= {list: "a list", dict: "a block of `name: value`"}
    kind = get_origin(option) or option
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "text"
    return names.get(kind, "a value")
