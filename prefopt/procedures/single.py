"""The plain procedure: one run, with a supervised start before it where the recipe asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.procedures.stage import Stage, TrainStage, procedure, refuse_unknown

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@procedure("single")
def single(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {start: {...}}`: first `sft` on the chosen answers, with these settings over the recipe's."""
    refuse_unknown(recipe, "start")
    if "start" not in recipe.procedure:
        return [TrainStage("train", recipe)]
    return with_start(recipe, recipe.procedure["start"] or {})


def start_folder(recipe: Recipe) -> Path:
    """Where the supervised stage leaves its model."""
    return Path(recipe.output_dir) / "start"


def with_start(recipe: Recipe, start: dict[str, object]) -> list[TrainStage]:
    """A supervised stage in `<output_dir>/start`, then the recipe itself from the model that stage leaves."""
    folder = str(start_folder(recipe))
    # A checkpoint that is named is one of the recipe's own run.
    resume = "never" if recipe.training.get("resume") == "never" else "auto"
    plain = {"loss": {"name": "sft"}, "loss_weights": None, "reference": None, "targets": None, "use_peft": False}
    supervised = recipe.replace(
        {**plain, "resume": resume, "push_to_hub": False, **start},
        output_dir=folder,
        procedure={},
    )
    main = recipe.replace(model_name_or_path=folder, from_scratch=None, procedure={})
    return [TrainStage("start", supervised), TrainStage("train", main)]
