"""From the `environment` block of a recipe to an environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from prefopt.environments.base import Environment
from prefopt.errors import RecipeError
from prefopt.losses.plugins import function_hash, plugin_function
from prefopt.world.social import Session

SOCIAL_WORLD = "social_world"
KINDS = ("function", SOCIAL_WORLD)


def check_environment(block: Any) -> dict[str, Any]:
    """The block, after refusing with `RecipeError` what is none. Opens nothing."""
    if not isinstance(block, Mapping) or len(block) != 1 or next(iter(block)) not in KINDS:
        raise RecipeError(
            "procedure.environment: must be {function: my_env.py:make}, with --plugin my_env.py on the command line, "
            f"or {{{SOCIAL_WORLD}: {{...}}}}, the embedded one."
        )
    return dict(block)


def environment_name(block: Mapping[str, Any]) -> str:
    """What an environment is called in messages."""
    return str(block.get("function", SOCIAL_WORLD))


def environment_facts(block: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how an environment answers: its block, and the file of a function.

    Raises `UserError` for a function that no plugin has.
    """
    if SOCIAL_WORLD in block:
        return {"environment": dict(block)}
    return {"environment": dict(block), "file": function_hash(str(block["function"]))}


def open_environment(block: Mapping[str, Any]) -> Environment:
    """The environment of a block. Raises `UserError` for a function that no plugin has."""
    if SOCIAL_WORLD in block:
        return Session.of_task
    return cast("Environment", plugin_function(str(block["function"])))
