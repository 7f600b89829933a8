"""The stages that procedures with rounds have in common: the data, the answers of each round's model, the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import release_memory

from prefopt.console import say
from prefopt.errors import RecipeError
from prefopt.generation.shards import MANIFEST
from prefopt.generation.vllm_engine import interpreter
from prefopt.hub.pushes import push_again
from prefopt.judges import judge_facts, refuse_unready
from prefopt.procedures.inputs import keep_plugins, sampled, sha256_of
from prefopt.procedures.pairing import SUPERVISED, TEST
from prefopt.procedures.rounds import (
    HELD_OUT,
    LENGTHS,
    OWN,
    RoundSettings,
    answers_folder,
    data_from,
    model_folder,
    refuse_no_data,
    refuse_unmeasured,
    round_folder,
    start_recipe,
)
from prefopt.procedures.single import with_start
from prefopt.procedures.small_world import Surroundings, with_texts
from prefopt.procedures.stage import MakeStage, Stage
from prefopt.ranks import on_main

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


def surroundings(recipe: Recipe, settings: RoundSettings) -> Surroundings:
    """What stands around the rounds: the small world where the recipe has one, or nothing.

    Raises `RecipeError` for a recipe whose rounds would have nothing to begin with.
    """
    if recipe.model.from_scratch is not None and "start" not in recipe.procedure:
        raise RecipeError("procedure.start: is missing. Random weights have no answers yet. Write start: {...}.")
    if "world" in recipe.procedure:
        around = with_texts(recipe, max_new_tokens=settings.max_new_tokens)
    else:
        refuse_no_data(recipe)
        around = Surroundings([], recipe, [])
    refuse_unmeasured(around.recipe, settings)
    return around


def data_stage(recipe: Recipe, data: Path, settings: RoundSettings, *, answers: bool) -> MakeStage:
    """The stage that writes the prompts of the recipe's data, with their `answers` or alone.

    It first refuses a judge that could not be opened after all the sampling.
    """

    def make() -> Any:
        from prefopt.procedures.answers import write_data

        if settings.use_vllm:
            interpreter()  # where there is none, that is to be known before hours of work
        for block in settings.judges:
            refuse_unready(block)
        keep_plugins(recipe, [block["function"] for block in settings.judges if "function" in block])
        counts = write_data(recipe, data, settings, answers=answers)
        say("data: " + ", ".join(f"{count:,} rows in {data / name}" for name, count in counts.items()))
        return counts

    facts = {
        "data": asdict(recipe.data),
        "seed": recipe.training.get("seed"),
        "prompts": settings.prompts,
        "eval_prompts": settings.eval_prompts,
    }
    files = recipe.data.local_files
    return MakeStage(
        "data",
        data,
        make,
        facts,
        inputs=lambda: {"files": {str(f): sha256_of(f) for f in files()}},
        summary=settings.told_prompts(train=True) + (", with the answers of the data" if answers else ""),
    )


def answers_stage(recipe: Recipe, data: Path, settings: RoundSettings, number: int) -> MakeStage:
    """The stage in which the model that round `number` starts from answers the prompts and is measured."""
    own, folder = start_recipe(recipe, number, settings.rounds), answers_folder(recipe, number)

    def make() -> Any:
        from prefopt.generation.shards import model_of
        from prefopt.procedures.answers import check_opponent, sample_answers, seed_of

        if number:
            before = answers_folder(recipe, number - 1) / OWN
            check_opponent(model_of(before), before, model_folder(recipe, number - 1, settings.rounds))
        release_memory()  # of the training before
        sampling = settings.sampling(number, seed_of(recipe))
        figures = sample_answers(own, data, folder, sampling, settings, train=number < settings.rounds)
        release_memory()  # for the training after
        return figures

    def inputs() -> dict[str, Any]:
        named = {"model": own.model.model_name_or_path, "tokenizer": own.model.tokenizer_name_or_path}
        models = {what: sampled(Path(name)) if name and Path(name).is_dir() else name for what, name in named.items()}
        template = own.model.chat_template_path
        return {
            **models,
            "template": sha256_of(Path(template)) if template else None,
            "data": {file.name: sha256_of(file) for file in sorted(data.glob("*.jsonl"))},
        }

    facts = {
        **_read_by_answers(own),
        **asdict(settings.sampling(number, 0)),
        "use_vllm": settings.use_vllm,
        "seed": recipe.training.get("seed"),
    }
    count = "an answer" if settings.samples == 1 else f"{settings.samples} answers"
    asked = settings.told_prompts(train=number < settings.rounds)
    return MakeStage(
        f"answers-{number}",
        folder,
        make,
        facts,
        on_every_rank=True,
        inputs=inputs,
        summary=f"{count} of at most {settings.max_new_tokens} tokens to {asked}, by {own.model.model_name_or_path}",
    )


def measured_stages(recipe: Recipe, settings: RoundSettings, number: int) -> list[MakeStage]:
    """The stage in which `measure` judges answers to held-out prompts, cut-off ones too; none without `measure`."""
    answers, folder = answers_folder(recipe, number) / HELD_OUT, round_folder(recipe, number) / "measured"

    def make() -> Any:
        from prefopt.procedures.judging import judge_answers
        from prefopt.procedures.pairing import write_figures

        judged = {
            name: judge_answers(block, answers, folder / name, cut_off=True) for name, block in settings.measure.items()
        }
        figures = {name: found["score"] for name, found in judged.items() if "score" in found}
        on_main(lambda: write_figures(folder, {"measured": figures}))
        say("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    def inputs() -> dict[str, Any]:
        judges = {name: judge_facts(block) for name, block in settings.measure.items()}
        return {"judges": judges, "answers": sha256_of(answers / MANIFEST)}

    if not settings.measure:
        return []
    told = f"{', '.join(settings.measure)} of the held-out answers"
    return [MakeStage(f"measured-{number}", folder, make, {}, on_every_rank=True, inputs=inputs, summary=told)]


def _read_by_answers(recipe: Recipe) -> dict[str, Any]:
    """What decides how a model is loaded, prompts are rendered and the data's own answers are measured."""
    named = ("chat_template_kwargs", *LENGTHS)
    model = asdict(recipe.model)
    del model["model_name_or_path"]  # `inputs` have what lies there
    return {**model, **{name: recipe.training.get(name) for name in named}}


def report_stage(recipe: Recipe, settings: RoundSettings, title: str) -> MakeStage:
    """The stage that lays the figures of all rounds side by side."""
    folder = Path(recipe.output_dir) / "report"

    def make() -> Any:
        from prefopt.procedures.answers import report

        recipe.dump(folder / "recipe.yaml")  # that of the run folder is the last round's alone
        rows = report(recipe, settings, folder, title)
        push_again(Path(recipe.output_dir), recipe.training)
        return rows

    told = "the models of all rounds side by side, in results.json, README.md and plots/rounds.png"
    return MakeStage("report", folder, make, {"rounds": settings.rounds}, summary=told)


def supervised_start(around: Surroundings, data: Path) -> tuple[Stage, Recipe]:
    """A supervised stage on the data's own answers, and the recipe with the model it leaves."""
    recipe = around.recipe
    files = {"train": str(data / SUPERVISED), **({"test": str(data / TEST)} if recipe.evaluates else {})}
    given = dict(recipe.procedure["start"] or {})
    start, _ = with_start(recipe.replace(data_from(files)), given)
    start = replace(start, most_rows=around.most_rows)
    return start, recipe.replace(model_name_or_path=str(start.folder), from_scratch=None, model_revision=None)
