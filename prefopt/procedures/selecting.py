"""The `select` of a recipe: which turns of two conversations make their segment."""

from __future__ import annotations

from typing import Any

from prefopt.data.segments import Selector, selector_of
from prefopt.errors import RecipeError, UserError

RULES = ("single_turn", "fixed:N", "to_end")


def read_selector(named: Any, *more: str) -> Selector:
    """The selector of a name in `RULES` or `more`; functions in files are left to `prefopt segments build`.

    Raises `RecipeError` for any other name.
    """
    known = (*RULES, *more)
    try:
        if str(named).partition(":")[0] in [rule.partition(":")[0] for rule in known]:
            return selector_of(str(named))
    except UserError:
        pass
    raise RecipeError(f"procedure.select: `{named}` is none of {', '.join(known)}.")
