"""Conversations from end to end on the embedded social world: a base agent, pairs of its sessions, their segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.data.segments import Selector
from prefopt.errors import RecipeError, UserError, nearest
from prefopt.procedures.selecting import read_selector
from prefopt.procedures.single import with_start
from prefopt.procedures.stage import MakeStage, Stage, procedure, refuse_unknown
from prefopt.world import social_stages as stages
from prefopt.world.social_stages import EVAL_SEGMENTS, SEGMENTS, SESSIONS, SocialSettings

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@procedure("social_world")
def social_world(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {name: social_world, select: given, world: {...}, start: {...}}`: `SocialSettings` for the world.

    `select` says which turns of a pair make its segment, as for `prefopt segments build`; in this world `given` is
    those that decided. The recipe names no data of its own: conversations and pairs are made in `<output_dir>/world`.
    """
    refuse_unknown(recipe, "select", "start", "world")
    if not recipe.objective().paired_required:
        names = " and ".join(loss.name for loss in recipe.loss)
        raise RecipeError(f"procedure: the social world makes pairs, and {names} reads single answers.")
    _refuse_data(recipe)
    settings = _settings(recipe.procedure.get("world"))
    named = recipe.procedure.get("select", "given")
    select = read_selector(named, "given")
    folder = Path(recipe.output_dir) / "world"
    start = {"data_files": str(folder / SESSIONS), "eval_strategy": "no", **(recipe.procedure.get("start") or {})}
    segments = {"train": str(folder / SEGMENTS), "test": str(folder / EVAL_SEGMENTS)}
    base, main = with_start(recipe.replace(data_files=segments), start)
    sizes = asdict(settings)

    def made(name: str, make: Callable[[], Any], summary: str, **more: str) -> MakeStage:
        return MakeStage(name, folder, make, {**sizes, **more}, summary=summary)

    return [
        made("sessions", lambda: stages.make_sessions(folder, settings), f"{settings.sessions} of the expert"),
        base,
        made("pairs", lambda: _pairs(base.folder, folder, settings), f"whole sessions, at most {settings.pairs} pairs"),
        made("segments", lambda: _segments(folder, select), f"the pairs, cut to the turns `{named}`", select=named),
        main,
        made("compare", lambda: _compare(base.folder, main.folder, folder, settings),
             f"sales and KL before and after, with {settings.partners} new partners"),
    ]  # fmt: skip


def _pairs(base: Path, folder: Path, settings: SocialSettings) -> dict[str, int]:
    counts = stages.make_pairs(base, folder, settings)
    if not all(counts.values()):
        raise UserError("the base model found no sale where it had failed: give it more sessions, epochs or tries")
    say("pairs: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    return counts


def _segments(folder: Path, select: Selector) -> None:
    say(*(f"segments: {line}" for line in stages.make_segments(folder, select).lines()))


def _compare(base: Path, policy: Path, folder: Path, settings: SocialSettings) -> dict[str, Any]:
    result = stages.compare(base, policy, folder, settings)
    say("", stages.comparison_text(result), "", f"curves: {policy}/plots/overview.png")
    return result


def _refuse_data(recipe: Recipe) -> None:
    for name in ("dataset_name", "data_files", "datasets"):
        if getattr(recipe.data, name):
            raise RecipeError(f"{name}: the social world makes its own data. To train on yours, remove `procedure`.")


def _settings(given: Any) -> SocialSettings:
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise RecipeError("procedure.world: must be a block, such as {sessions: 4000}.")
    known = [field.name for field in fields(SocialSettings)]
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"procedure.world.{name}: not known.{nearest(name, known)} Known: {', '.join(known)}.")
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"procedure.world.{name}: must be a whole number, not {value!r}.")
    try:
        return SocialSettings(**given)
    except UserError as error:
        raise RecipeError(f"procedure.world.{error}") from None
