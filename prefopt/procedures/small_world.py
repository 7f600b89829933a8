"""The embedded default: a world with a known reward, a base model, pairs sampled from it, then the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.errors import RecipeError, UserError, nearest
from prefopt.procedures.single import with_start
from prefopt.procedures.stage import MakeStage, Stage, procedure, refuse_unknown
from prefopt.world import stages
from prefopt.world.stages import EVAL_PAIRS, PAIRS, TEXTS, WorldSettings

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@procedure("small_world")
def small_world(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {start: {...}, world: {...}}`: settings of the supervised stage, and sizes (`WorldSettings`).

    The recipe names no data of its own: texts and pairs are made in `<output_dir>/world`.
    """
    refuse_unknown(recipe, "start", "world")
    settings = _settings(recipe.procedure.get("world") or {})
    folder = Path(recipe.output_dir) / "world"
    start = {"data_files": str(folder / TEXTS), **(recipe.procedure.get("start") or {})}
    pairs = {"train": str(folder / PAIRS), "test": str(folder / EVAL_PAIRS)}
    base, main = with_start(recipe.replace(data_files=pairs), start)
    sizes = asdict(settings)
    return [
        MakeStage("texts", folder, lambda: stages.make_texts(folder, settings), sizes),
        base,
        MakeStage("pairs", folder, lambda: _pairs(base.folder, folder, settings), sizes),
        main,
        MakeStage("compare", folder, lambda: _compare(base.folder, main.folder, folder, settings), sizes),
    ]


def _pairs(base: Path, folder: Path, settings: WorldSettings) -> None:
    counts = stages.make_pairs(base, folder, settings)
    if not counts["pairs"] or not counts["eval_pairs"]:
        raise UserError("the base model wrote no two usable answers to a prompt: give it more texts or epochs")
    say("pairs: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


def _compare(base: Path, policy: Path, folder: Path, settings: WorldSettings) -> dict[str, Any]:
    result = stages.compare(base, policy, folder, settings)
    say("", stages.comparison_text(result), "", f"curves: {policy}/plots/overview.png")
    return result


def _settings(given: dict[str, Any]) -> WorldSettings:
    known = [field.name for field in fields(WorldSettings)]
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"procedure.world.{name}: not known.{nearest(name, known)} Known: {', '.join(known)}.")
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"procedure.world.{name}: must be a whole number, not {value!r}.")
    return WorldSettings(**given)
