"""A procedure is a plan of stages: data about a run, computed from the recipe alone, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import RecipeError, UserError, nearest

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@dataclass(frozen=True)
class TrainStage:
    """One training run: a recipe whose model, data and output folder are this stage's own.

    `most_rows`: how many rows an earlier stage will make for it at most, where the plan knows. `made_test`: its test
    file is made by an earlier stage too, which leaves none where it finds no row for it; then nothing is evaluated.
    """

    name: str
    recipe: Recipe
    most_rows: int | None = None
    made_test: bool = False

    @property
    def folder(self) -> Path:
        """Where the stage leaves its model, figures and done mark."""
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class MakeStage:
    """A step that makes files rather than trains: `make()` writes into `folder`.

    It runs on the main process alone, or on all of them where `on_every_rank` is set. `settings` is what the result
    depends on beside the stages before it; `inputs()` is what of that is known only when the stage begins, such as
    hashes of the files it reads. `summary` says in a line what it makes and what that costs.
    """

    name: str
    folder: Path
    make: Callable[[], Any]
    settings: dict[str, Any]
    on_every_rank: bool = False
    inputs: Callable[[], dict[str, Any]] = dict
    summary: str = ""


Stage = TrainStage | MakeStage
Plan = Callable[["Recipe"], Sequence[Stage]]

_PLANS: dict[str, Plan] = {}


def procedure(name: str) -> Callable[[Plan], Plan]:
    """Register a plan under the name that a recipe's `procedure` block gives."""

    def register(plan: Plan) -> Plan:
        if name in _PLANS:
            raise ValueError(f"procedure {name!r} is registered twice")
        _PLANS[name] = plan
        return plan

    return register


def procedures() -> list[str]:
    """Names of the procedures, sorted."""
    return sorted(_PLANS)


def make_plan(recipe: Recipe) -> Sequence[Stage]:
    """The stages of a recipe, in order. Pure: reads no file and opens no model."""
    name = recipe.procedure.get("name", "single")
    if name not in _PLANS:
        known = ", ".join(procedures())
        raise RecipeError(f"procedure.name: `{name}` is not a procedure.{nearest(name, _PLANS)} Known: {known}.")
    return _PLANS[name](recipe)


def find_stage(stages: Sequence[Stage], wanted: str) -> Stage:
    """The stage of a plan with this number, counted from 1, or this name. Raises `UserError` when there is none."""
    if wanted.isdecimal() and 1 <= int(wanted) <= len(stages):
        return stages[int(wanted) - 1]
    for stage in stages:
        if stage.name == wanted:
            return stage
    known = ", ".join(f"{number} {stage.name}" for number, stage in enumerate(stages, start=1))
    hint = nearest(wanted, [stage.name for stage in stages])
    raise UserError(f"--stage: the plan has no stage `{wanted}`.{hint} It has: {known}.")


def refuse_unknown(recipe: Recipe, *known: str) -> None:
    """Raise `RecipeError` for a key of the `procedure` block that its plan does not read."""
    for key in recipe.procedure:
        if key not in ("name", *known):
            allowed = ", ".join(("name", *known))
            raise RecipeError(f"procedure.{key}: not read by this procedure.{nearest(key, known)} It reads {allowed}.")
