"""The register of losses: a loss is found by the name it registered itself under, and there is no second list."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, TypeVar

from prefopt.errors import RecipeError, UserError, nearest
from prefopt.losses.base import Loss, Needs
from prefopt.losses.elsewhere import explain, is_taken
from prefopt.losses.knobs import Knob, knobs_of

ENTRY_POINTS = "prefopt.losses"
_OWN = "One from a file of your own is read with `--plugin FILE`."

_LOSSES: dict[str, type[Loss]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SOURCE = re.compile(r"arxiv|doi\.org|https?://|source:", re.IGNORECASE)

SomeLoss = TypeVar("SomeLoss", bound=Loss)


def register(name: str) -> Callable[[type[SomeLoss]], type[SomeLoss]]:
    """Class decorator, written above `@dataclass(frozen=True)`: makes the loss available as `name`.

    `UserError` when the name is not a lower-case identifier or is taken, or the class is not a whole loss.
    """

    def add(loss: type[SomeLoss]) -> type[SomeLoss]:
        _check_name(name, loss)
        if fault := _fault(loss):
            raise UserError(f"loss `{name}` ({loss.__name__}): {fault}")
        loss.name = name
        _LOSSES[name] = loss
        return loss

    return add


def names() -> list[str]:
    """Every registered loss, sorted; those of installed packages included."""
    _load_entry_points()
    return sorted(_LOSSES)


def get(name: str) -> type[Loss]:
    """The class registered as `name`. `RecipeError` with what was probably meant when there is none."""
    if name not in _LOSSES:
        _load_entry_points()
    if name not in _LOSSES:
        known = sorted(_LOSSES)
        meant = explain(name, known) or f"there is no loss `{name}`.{nearest(name.lower(), known)}"
        raise RecipeError(f"loss.name: {meant} Losses: {', '.join(known)}. {_OWN}")
    return _LOSSES[name]


def make(name: str, /, **knobs: Any) -> Loss:
    """The loss `name` with these knobs: `make("dpo", beta=0.2)`.

    `RecipeError` for an unknown name, for a knob the loss does not read, and for a value outside a knob's range.
    """
    loss = get(name)
    own = [knob.name for knob in knobs_of(loss)]
    for knob in knobs:
        if knob not in own:
            raise RecipeError(f"loss.{knob}: `{name}` does not read it.{_hint(knob, own)}")
    return loss(**knobs)


def registered_by(module: str) -> list[str]:
    """Names of the losses whose classes live in the module of this name."""
    return sorted(name for name, loss in _LOSSES.items() if loss.__module__ == module)


def forget(module: str) -> None:
    """Take back whatever a module registered; for one that failed half-way."""
    for name in registered_by(module):
        del _LOSSES[name]


def _hint(knob: str, own: list[str]) -> str:
    knobs = f" Its knobs: {', '.join(own)}." if own else " It has no knobs."
    readers = [f"`{name}`" for name in names() if knob in [other.name for other in knobs_of(_LOSSES[name])]]
    if readers:
        return f" Losses that do: {', '.join(readers)}.{knobs}"
    return nearest(knob, own) + knobs


def _check_name(name: str, loss: type) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"loss `{name}`: a name is lower case, letters, digits and underscores, a letter first")
    if is_taken(name):
        raise UserError(f"loss `{name}`: the name means something else already. {explain(name, _LOSSES)}")
    old = _LOSSES.get(name)
    if old is not None and origin(old) != origin(loss):
        first, second = (" of ".join(origin(one)) for one in (old, loss))
        raise UserError(f"loss `{name}`: the name is taken by {first}, so {second} needs another")


def origin(loss: type) -> tuple[str, str]:
    """Class and file, which stay the same when a module is loaded once more."""
    module = sys.modules.get(loss.__module__)
    return loss.__qualname__, getattr(module, "__file__", None) or loss.__module__


def _fault(loss: type) -> str:
    """What keeps a class from being a loss; empty when nothing does."""
    if not (isinstance(loss, type) and issubclass(loss, Loss)):
        return "it does not derive from prefopt.losses.Loss"
    if "__dataclass_params__" not in vars(loss):
        return "write @dataclass(frozen=True) right below @register"
    if inspect.isabstract(loss):
        return "it defines no __call__"
    if not isinstance(getattr(loss, "needs", None), Needs):
        return "it declares no `needs = Needs(...)`"
    units = ("pair",) if loss.needs.view == "pairs" else ("completion", "token")
    if loss.unit not in units:
        return f"unit is {loss.unit!r}; with view {loss.needs.view!r} it must be {' or '.join(units)}"
    if not _SOURCE.search(loss.__doc__ or ""):
        return "its docstring names no source: an arXiv number, a DOI, a link, or `Source: ...`"
    return _knob_fault(loss)


def _knob_fault(loss: type[Loss]) -> str:
    for knob in knobs_of(loss):
        if knob.name in ("name", "needs", "unit"):
            return f"`{knob.name}` cannot be a knob"
        if not knob.help or not (knob.range or knob.type is bool):
            return f"the knob `{knob.name}` lacks its meaning or its range: write {_example(knob)}"
    try:
        loss()
    except (TypeError, RecipeError) as fault:
        return f"it cannot be made from its defaults: {fault}"
    return ""


def _example(knob: Knob) -> str:
    """The line of a class that gives a knob all it must have."""
    limits = {str: ', choices=("...", "...")', bool: ""}.get(knob.type, ", above=..., at_most=...")
    default = "..." if knob.default is MISSING else repr(knob.default)
    kind = knob.type.__name__ + (" | None" if knob.optional else "")
    return f'`{knob.name}: {kind} = knob({default}, help="..."{limits})`'


@functools.cache
def _load_entry_points() -> None:
    """Import the losses of installed packages, once. A broken one is reported and the others still load."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as fault:
            warnings.warn(f"losses of `{entry.value}` did not load: {type(fault).__name__}: {fault}", stacklevel=3)
