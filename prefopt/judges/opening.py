"""From the `judge` block of a recipe to a judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import RecipeError, nearest
from prefopt.judges.base import Judge
from prefopt.judges.command import CommandJudge, permitted
from prefopt.judges.endpoint import EndpointJudge
from prefopt.judges.function import FunctionJudge
from prefopt.judges.reward import RewardJudge
from prefopt.judges.world import FIGURES, WorldJudge
from prefopt.losses.plugins import function_hash

_KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "function": (FunctionJudge, ()),
    "command": (CommandJudge, ("seconds",)),
    "reward_model": (RewardJudge, ("dtype", "batch_size", "max_length")),
    "endpoint": (
        EndpointJudge,
        ("model", "criterion", "workers", "retries", "seconds", "max_tokens", "prices"),
    ),
    "world": (WorldJudge, ()),
}


def check_judge(block: Any, key: str = "judge") -> dict[str, Any]:
    """The block, after refusing with `RecipeError` what no judge reads. Opens nothing.

    `key`: what the block is called within `procedure`.
    """
    if not isinstance(block, Mapping):
        raise RecipeError(f"procedure.{key}: is missing. Write {key}: {{reward_model: NAME}}, or another of its kinds.")
    kinds = [name for name in _KINDS if name in block]
    if len(kinds) != 1:
        raise RecipeError(f"procedure.{key}: needs one of {', '.join(_KINDS)}, and has {len(kinds)}.")
    known = _KINDS[kinds[0]][1]
    for name in block:
        if name not in (kinds[0], *known):
            reads = ", ".join((kinds[0], *known))
            raise RecipeError(f"procedure.{key}.{name}: not read.{nearest(name, known)} It reads {reads}.")
    if "model" in known and not block.get("model"):
        raise RecipeError(f"procedure.{key}.model: is missing. Write the name the endpoint knows its model by.")
    if "world" in block and block["world"] not in FIGURES:
        named, has = block["world"], ", ".join(FIGURES)
        raise RecipeError(f"procedure.{key}.world: `{named}` is no figure of the small world. It has {has}.")
    return dict(block)


def refuse_unready(block: Mapping[str, Any]) -> None:
    """Raise `UserError` for a judge that could not be opened, as far as that shows without a program or a model."""
    if "command" in block:
        permitted(block["command"])
    elif "reward_model" not in block:
        open_judge(block)


def judge_facts(block: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on a judge's scores: its settings, the file of a function, the files of a local model.

    Raises `UserError` for a function that no plugin has.
    """
    from prefopt.procedures.inputs import sampled  # procedures import judges

    model = Path(str(block.get("reward_model", "")))
    if "reward_model" in block and model.is_dir():
        return {"judge": dict(block), "model": sampled(model)}
    if "function" not in block:
        return {"judge": dict(block)}
    return {"judge": dict(block), "file": function_hash(str(block["function"]))}


def open_judge(block: Mapping[str, Any]) -> Judge:
    """The judge of a block. Raises `UserError` where it cannot be had."""
    settings = check_judge(block)
    kind = next(name for name in _KINDS if name in settings)
    judge: Judge = _KINDS[kind][0](settings.pop(kind), **settings)
    return judge
