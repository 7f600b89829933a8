"""The embedded default: a world with a known reward, a base model, pairs sampled from it, then the recipe.

Other procedures stand in the same world by a `world` block of their own: its texts and a model that learnt them come
before their stages, and a comparison by the true reward after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.errors import RecipeError, UserError, nearest
from prefopt.procedures.single import start_folder, with_start
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, procedure, refuse_unknown
from prefopt.world import stages
from prefopt.world.stages import EVAL_PAIRS, HELD_OUT_TEXTS, PAIRS, TEXTS, WorldSettings

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

# What a procedure that samples its own answers reads of the sizes.
_OF_TEXTS = ("texts", "eval_prompts", "seed")


@dataclass(frozen=True)
class Surroundings:
    """What stands around a procedure: stages `before` it, the `recipe` from what they leave, and stages `after` it.

    `most_rows`: how many rows of data the stages before make at most, where they make them.
    """

    before: list[Stage]
    recipe: Recipe
    after: list[Stage]
    most_rows: int | None = None


@procedure("small_world")
def small_world(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {start: {...}, world: {...}}`: settings of the supervised stage, and sizes (`WorldSettings`).

    The recipe names no data of its own: texts and pairs are made in `<output_dir>/world`.
    """
    refuse_unknown(recipe, "start", "world")
    around = with_pairs(recipe)
    return [*around.before, TrainStage("train", around.recipe, around.most_rows), *around.after]


def with_pairs(recipe: Recipe) -> Surroundings:
    """The small world around a recipe over pairs: texts, a model that learnt them, and pairs that it wrote."""
    settings = _settings(recipe, [field.name for field in fields(WorldSettings)])
    folder = _folder(recipe)
    start = {"data_files": str(folder / TEXTS), **(recipe.procedure.get("start") or {})}
    pairs = {"train": str(folder / PAIRS), "test": str(folder / EVAL_PAIRS)}
    base, main = with_start(recipe.replace(data_files=pairs), start)
    base = replace(base, most_rows=settings.texts)
    sampled = MakeStage(
        "pairs",
        folder,
        lambda: _pairs(base.folder, folder, settings),
        asdict(settings),
        summary=f"{settings.samples_per_prompt} answers to each of {settings.prompts} openings, best against worst",
    )
    compared = _compare_stage(base.folder, main.folder, folder, settings)
    most = settings.prompts * settings.pairs_per_prompt
    return Surroundings([_texts_stage(folder, settings), base, sampled], main.recipe, [compared], most)


def with_texts(recipe: Recipe, *, max_new_tokens: int) -> Surroundings:
    """The small world around a recipe whose rounds sample answers, of at most so many tokens, to its openings.

    The data are the grammar's reviews, and those of openings never trained on to evaluate on.
    """
    if "start" not in recipe.procedure:
        raise RecipeError("procedure.start: is missing. A model has to learn the world's texts. Write start: {...}.")
    settings = _settings(recipe, _OF_TEXTS, max_new_tokens=max_new_tokens)
    folder = _folder(recipe)
    texts = {"train": str(folder / TEXTS), "test": str(folder / HELD_OUT_TEXTS)}
    compared = _compare_stage(start_folder(recipe), Path(recipe.output_dir), folder, settings)
    return Surroundings([_texts_stage(folder, settings)], recipe.replace(data_files=texts), [compared], settings.texts)


def _texts_stage(folder: Path, settings: WorldSettings) -> MakeStage:
    summary = f"{settings.texts} reviews by the grammar, and {settings.eval_prompts} to openings that are held out"
    return MakeStage("texts", folder, lambda: stages.make_texts(folder, settings), asdict(settings), summary=summary)


def _compare_stage(base: Path, policy: Path, folder: Path, settings: WorldSettings) -> MakeStage:
    summary = f"true reward and KL of the answers to {settings.eval_prompts} held-out openings, before and after"
    return MakeStage(
        "compare", folder, lambda: _compare(base, policy, folder, settings), asdict(settings), summary=summary
    )


def _pairs(base: Path, folder: Path, settings: WorldSettings) -> None:
    counts = stages.make_pairs(base, folder, settings)
    if not counts["pairs"] or not counts["eval_pairs"]:
        raise UserError("the base model wrote no two usable answers to a prompt: give it more texts or epochs")
    say("pairs: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


def _compare(base: Path, policy: Path, folder: Path, settings: WorldSettings) -> dict[str, Any]:
    result = stages.compare(base, policy, folder, settings)
    say("", stages.comparison_text(result), "", f"curves: {policy}/plots/overview.png")
    return result


def _folder(recipe: Recipe) -> Path:
    """Where the world lies. Raises `RecipeError` for data beside it."""
    data = recipe.data
    if data.dataset_name or data.data_files or data.datasets:
        raise RecipeError("procedure.world: makes its own data. Remove it to train on yours, or remove the data.")
    return Path(recipe.output_dir) / "world"


def _settings(recipe: Recipe, known: Sequence[str], **more: int) -> WorldSettings:
    given = recipe.procedure.get("world") or {}
    if not isinstance(given, dict):
        raise RecipeError("procedure.world: expected a block of sizes. Write world: {texts: 3000}.")
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"procedure.world.{name}: not known.{nearest(name, known)} Known: {', '.join(known)}.")
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"procedure.world.{name}: must be a whole number, not {value!r}.")
    return WorldSettings(**given, **more)
