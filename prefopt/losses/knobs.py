"""Knobs: the hyper-parameters of a loss, each with its range, its meaning and the values its paper used.

A knob is a field of the loss's dataclass, written `beta: float = knob(0.1, help=..., above=0)`. No knob of a registered
loss is without a meaning and, unless it is true or false, a range or choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from prefopt.errors import RecipeError, UserError

_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def knob(
    default: Any,
    *,
    help: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    published: str = "",
) -> Any:
    """A field of a loss, with its meaning (`help`), its range or `choices`, and the `published` values with sources."""
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    return field(default=default, metadata={"help": help, "choices": choices, "published": published, **limits})


@dataclass(frozen=True)
class Knob:
    """What is known of one knob: `type` is float, int, bool or str; `optional` says that null is a value too."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    published: str = ""

    @property
    def range(self) -> str:
        """The limits in words, such as "at least 0, below 0.5" or "mean | sum"; empty when there are none."""
        if self.choices:
            return " | ".join(self.choices)
        limits = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return ", ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)

    @property
    def allowed(self) -> str:
        """What may be written, in words: "a number above 0"."""
        text = f"one of {self.range}" if self.choices else f"{_KINDS[self.type]} {self.range}".strip()
        return text + (", or null" if self.optional else "")

    def checked(self, value: Any, loss: str) -> Any:
        """`value` as the knob's type; `RecipeError` naming loss, knob, value and range when it is not allowed."""
        if self._refuses(value):
            hint = " YAML reads 1e-6 as text: write 1.0e-6." if self.type is not str and _is_number(value) else ""
            raise RecipeError(f"loss.{self.name}: `{loss}` takes {self.allowed}, not {value!r}.{hint}")
        return float(value) if self.type is float and value is not None else value

    def _refuses(self, value: Any) -> bool:
        if value is None:
            return not self.optional
        if isinstance(value, bool) or self.type is bool:
            return self.type is not bool or not isinstance(value, bool)
        if self.type is str:
            return not isinstance(value, str) or bool(self.choices and value not in self.choices)
        if not isinstance(value, int if self.type is int else (int, float)):
            return True
        return not self._within(value)

    def _within(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def knobs_of(loss: type) -> tuple[Knob, ...]:
    """The knobs of a loss class, as written. `UserError` for a field of a kind that no recipe can hold."""
    hints = get_type_hints(loss)
    known = []
    for entry in fields(loss):
        kinds = get_args(hints[entry.name]) or (hints[entry.name],)
        plain = [kind for kind in kinds if kind is not NoneType]
        if len(plain) != 1 or plain[0] not in _KINDS:
            raise UserError(f"{loss.__name__}.{entry.name}: a knob is a float, int, bool or str, or `| None` of one")
        known.append(Knob(entry.name, plain[0], NoneType in kinds, entry.default, **entry.metadata))
    return tuple(known)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
