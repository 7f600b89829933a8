"""Rounds in an environment, ETO's loop (arXiv 2403.02502): the model tries every task, and learns from what came of it.

In each round the model that the last one left tries each task once. Its trajectory and the expert's make a pair, with
the one that earned more as chosen; where both earned the same there is none. The reference of a round is the model it
starts from. Pairs hold whole trajectories, or with `select` the segments in which they differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import release_memory

from prefopt.console import say
from prefopt.environments import check_environment, environment_facts
from prefopt.environments.opening import SOCIAL_WORLD
from prefopt.errors import RecipeError, UserError, nearest
from prefopt.procedures.inputs import keep_plugins, sampled, sha256_of
from prefopt.procedures.pairing import FIGURES, TEST, TRAIN, write_figures, write_held_out, write_rows
from prefopt.procedures.round_stages import data_stage, supervised_start
from prefopt.procedures.rounds import (
    HELD_OUT,
    OWN,
    PAIRS,
    TEST_PAIRS,
    RoundSettings,
    check_count,
    model_folder,
    read_settings,
    refuse_no_data,
    refuse_other_reference,
    round_folder,
    round_recipe,
    start_recipe,
)
from prefopt.procedures.selecting import read_selector
from prefopt.procedures.small_world import Surroundings
from prefopt.procedures.stage import MakeStage, Stage, TrainStage
from prefopt.world.social_tasks import TASKS, TEST_TASKS, TaskSettings, make_tasks

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

EXPLORED = "explored"


@dataclass(frozen=True)
class ExploringSettings(RoundSettings):
    """`environment`: a block of one of the kinds in `prefopt.environments`. `max_turns`: of the agent in an episode.

    `success`: the reward from which an episode counts as one, in the figures alone. `select`: the turns of a pair that
    are trained on, for losses that compare segments; whole trajectories when None. `eval_prompts` are all the held-out
    tasks of the embedded environment unless written.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    max_turns: int = 20
    success: float = 1.0
    select: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_environment(self.environment)
        check_count("max_turns", self.max_turns)
        if not isinstance(self.success, (int, float)) or isinstance(self.success, bool):
            raise RecipeError(f"procedure.success: must be a number, not {self.success!r}.")
        if self.select is not None:
            read_selector(self.select)


def exploring(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {name: online, environment: {...}, rounds: 3, ...}`: `ExploringSettings`, and `start: {...}`.

    The data are the expert's trajectories: `prompt`, `completion` (all messages after it), `reward`, and whatever else
    the environment reads. The stages of round t are `explore-t`, `pairs-t` and `train-t`; after the last one the final
    model tries the held-out tasks, and all is reported.
    """
    settings = read_settings(ExploringSettings, recipe, besides=("start",))
    refuse_other_reference(recipe)
    if settings.use_vllm:
        raise RecipeError("procedure.use_vllm: has no effect in an environment, whose turns transformers samples.")
    if settings.measure:
        raise RecipeError("procedure.measure: has no effect in an environment, whose reward is measured.")
    if recipe.model.from_scratch is not None and "start" not in recipe.procedure:
        raise RecipeError("procedure.start: is missing. Random weights cannot act yet. Write start: {...}.")
    if not recipe.objective().paired_required:
        raise RecipeError("loss: an environment makes pairs, and this loss reads single answers.")
    before, recipe, settings = _tasks(recipe, settings)
    whole, data = recipe, Path(recipe.output_dir) / "data"
    stages: list[Stage] = [*before, _data_stage(recipe, data, settings)]
    if "start" in recipe.procedure:
        start, recipe = supervised_start(Surroundings([], recipe, []), data)
        stages.append(start)
    for number in range(settings.rounds):
        stages += [
            _explore_stage(recipe, data, settings, number),
            _pairs_stage(recipe, data, settings, number),
            TrainStage(
                f"train-{number}",
                round_recipe(recipe, settings, number, has_test=recipe.evaluates),
                made_test=True,
            ),
        ]
    if recipe.evaluates:
        stages.append(_explore_stage(recipe, data, settings, settings.rounds))
    return [*stages, _report_stage(whole, settings)]


def _tasks(recipe: Recipe, settings: ExploringSettings) -> tuple[list[Stage], Recipe, ExploringSettings]:
    """The stage that makes the tasks of the embedded environment, the recipe that reads them, and the settings, with
    all its held-out tasks where `eval_prompts` is not written."""
    if SOCIAL_WORLD not in settings.environment:
        refuse_no_data(recipe)
        return [], recipe, settings
    for name in ("dataset_name", "data_files", "datasets"):
        if getattr(recipe.data, name):
            raise RecipeError(f"{name}: contradicts procedure.environment.{SOCIAL_WORLD}, which makes its own tasks.")
    sizes = _sizes(settings.environment[SOCIAL_WORLD] or {})
    folder = Path(recipe.output_dir) / "world"
    summary = f"{sizes.tasks} tasks and {sizes.test_tasks} to test on, with what an expert did"
    stage = MakeStage("tasks", folder, lambda: make_tasks(folder, sizes), asdict(sizes), summary=summary)
    if "eval_prompts" not in recipe.procedure:
        settings = replace(settings, eval_prompts=sizes.test_tasks)
    files = {"train": str(folder / TASKS), "test": str(folder / TEST_TASKS)}
    return [stage], recipe.replace(data_files=files), settings


def _sizes(given: Any) -> TaskSettings:
    place, known = f"procedure.environment.{SOCIAL_WORLD}", [item.name for item in fields(TaskSettings)]
    if not isinstance(given, dict):
        raise RecipeError(f"{place}: must be a block, such as {{tasks: 2000}}.")
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"{place}.{name}: not known.{nearest(name, known)} Known: {', '.join(known)}.")
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecipeError(f"{place}.{name}: must be a whole number, not {value!r}.")
    try:
        return TaskSettings(**given)
    except UserError as error:
        raise RecipeError(f"{place}.{error}") from None


def _data_stage(recipe: Recipe, data: Path, settings: ExploringSettings) -> MakeStage:
    """The stage of the tasks, which first refuses an environment that is not there."""

    def make() -> Any:
        from prefopt.procedures.episodes import write_tasks

        environment_facts(settings.environment)
        function = settings.environment.get("function")
        keep_plugins(recipe, [function] if function else [])
        counts = write_tasks(recipe, data, settings)
        say("data: " + ", ".join(f"{count:,} rows in {data / name}" for name, count in counts.items()))
        return counts

    summary = f"the tasks of all rounds: {settings.told_prompts(train=True)}"
    return replace(data_stage(recipe, data, settings, answers=True), make=make, summary=summary)


def _explore_stage(recipe: Recipe, data: Path, settings: ExploringSettings, number: int) -> MakeStage:
    own, folder = start_recipe(recipe, number, settings.rounds), round_folder(recipe, number) / EXPLORED

    def make() -> Any:
        from prefopt.procedures.answers import check_opponent, seed_of
        from prefopt.procedures.episodes import explore_tasks

        if number:
            before = round_folder(recipe, number - 1) / EXPLORED / FIGURES
            model = json.loads(before.read_text(encoding="utf-8"))["model"]
            check_opponent(model, before.parent, model_folder(recipe, number - 1, settings.rounds))
        release_memory()  # of the training before
        files = {HELD_OUT: data / TEST, **({OWN: data / TRAIN} if number < settings.rounds else {})}
        figures = explore_tasks(own, files, folder, settings, settings.sampling(number, seed_of(recipe)))
        for part in files.keys() & figures.keys():
            say(f"explored, {part}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures[part].items()))
        release_memory()  # for the training after
        return figures

    def inputs() -> dict[str, Any]:
        name = own.model.model_name_or_path
        model = sampled(Path(name)) if name and Path(name).is_dir() else name
        tasks = {file.name: sha256_of(file) for file in sorted(data.glob("*.jsonl"))}
        return {**environment_facts(settings.environment), "model": model, "tasks": tasks}

    facts = {
        **asdict(settings.sampling(number, 0)),
        "seed": recipe.training.get("seed"),
        "max_turns": settings.max_turns,
        "chat_template_kwargs": recipe.training.get("chat_template_kwargs"),
    }
    summary = f"one episode of every task, at most {settings.max_turns} turns each"
    return MakeStage(f"explore-{number}", folder, make, facts, on_every_rank=True, inputs=inputs, summary=summary)


def _pairs_stage(recipe: Recipe, data: Path, settings: ExploringSettings, number: int) -> MakeStage:
    explored, folder = round_folder(recipe, number) / EXPLORED, round_folder(recipe, number) / "pairs"

    def make() -> Any:
        from prefopt.procedures.episodes import trajectory_pairs
        from prefopt.procedures.pairing import read_data

        select = None if settings.select is None else read_selector(settings.select)
        model = start_recipe(recipe, number, settings.rounds).model.model_name_or_path
        over = f". The rounds end here: their result is the model in {model}"
        found = {}
        for part, file, name in ((OWN, TRAIN, PAIRS), (HELD_OUT, TEST, TEST_PAIRS)):
            if (data / file).is_file():
                rows, counts = trajectory_pairs(read_data(data / file), explored / part, select)
                why_none = _why_none(counts)
                if part == HELD_OUT:
                    write_held_out(folder / name, rows, why_none)
                elif rows:
                    write_rows(folder / name, rows)
                else:
                    raise UserError(f"round {number}: no pair could be made of {data / file}: {why_none}{over}")
                say(f"round {number}, {part}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
                found[part] = dict(counts)
        episodes = {part: sum(counts.values()) for part, counts in found.items()}
        ties = {part: {"ties": counts.get("ties", 0) / episodes[part]} for part, counts in found.items()}
        write_figures(folder, ties)
        return found

    return MakeStage(f"pairs-{number}", folder, make, {"select": settings.select})


def _why_none(counts: Counter[str]) -> str:
    """Why the episodes made no pair."""
    if counts["ties"] == counts.total():
        return "on every task the model earns what the expert does, so there is nothing left to learn"
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"the model earns what the expert does, or its episode cannot be used ({told})"


def _report_stage(recipe: Recipe, settings: ExploringSettings) -> MakeStage:
    folder = Path(recipe.output_dir) / "report"

    def make() -> Any:
        from prefopt.procedures.exploring_report import report

        recipe.dump(folder / "recipe.yaml")  # that of the run folder is the last round's alone
        return report(recipe, settings, folder)

    return MakeStage("report", folder, make, {"rounds": settings.rounds, "success": settings.success})
