"""Rounds on the model's own answers: sample some to each prompt, judge them, train on the best against the worst.

With the loss of DPO this is iterative DPO (arXiv 2312.16682, 2405.07863); with a judge that is the model itself,
self-rewarding (arXiv 2401.10020). The reference of each round is the model that the round starts from, whose answers
it is trained on. Answers that were cut off are not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.errors import RecipeError, UserError
from prefopt.judges import check_judge, judge_facts
from prefopt.procedures.exploring import exploring
from prefopt.procedures.inputs import sha256_of
from prefopt.procedures.pairing import TEST, TRAIN, read_data, write_held_out, write_rows
from prefopt.procedures.round_stages import answers_stage, data_stage, measured_stages, report_stage, surroundings
from prefopt.procedures.rounds import (
    HELD_OUT,
    OWN,
    PAIRS,
    TEST_PAIRS,
    RoundSettings,
    answers_folder,
    check_count,
    read_settings,
    refuse_other_reference,
    round_folder,
    round_recipe,
)
from prefopt.procedures.single import with_start
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, procedure
from prefopt.ranks import on_main

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

JUDGED = "judged"


@dataclass(frozen=True)
class OnlineSettings(RoundSettings):
    """`samples_per_prompt` answers are judged by `judge`, a block of one of the kinds in `prefopt.judges`.

    `sample_targets`: rows get a column `target`, a plain sample of the reference (SLiC-HF, arXiv 2305.10425).
    """

    samples_per_prompt: int = 4
    judge: dict[str, Any] = field(default_factory=dict)
    sample_targets: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("samples_per_prompt", self.samples_per_prompt)
        if self.samples_per_prompt < 2:
            raise RecipeError("procedure.samples_per_prompt: must be at least 2: one answer has no other to lose to.")
        if not isinstance(self.sample_targets, bool):
            raise RecipeError("procedure.sample_targets: must be true or false.")
        check_judge(self.judge or None)

    @property
    def judges(self) -> list[dict[str, Any]]:
        return [self.judge, *super().judges]

    @property
    def samples(self) -> int:
        return self.samples_per_prompt


@procedure("online")
def online(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {name: online, rounds: 3, judge: {...}, ...}`: `OnlineSettings`, and `start: {...}`.

    The data are prompts; answers in their rows are read by the supervised stage of `start` alone. With `world: {...}`
    they are those of the small world. The stages of round t are `answers-t`, `judged-t`, `measured-t` where there is
    something to `measure`, `pairs-t` and `train-t`; after the last one the final model answers and is judged, and all
    is reported.
    """
    if "environment" in recipe.procedure:
        return exploring(recipe)
    settings = read_settings(OnlineSettings, recipe, besides=("start", "world"))
    refuse_other_reference(recipe)
    around, data = surroundings(recipe, settings), Path(recipe.output_dir) / "data"
    stages: list[Stage] = [*around.before, data_stage(around.recipe, data, settings, answers=False)]
    first = around.recipe
    if "start" in recipe.procedure:
        start, main = with_start(first, recipe.procedure["start"] or {})
        stages.append(start)
        first = main.recipe
    for number in range(settings.rounds):
        stages += [
            *_judged_answers(first, data, settings, number),
            _pairs_stage(first, data, settings, number),
            TrainStage(
                f"train-{number}",
                round_recipe(first, settings, number, has_test=first.evaluates),
                most_rows=settings.prompts,
                made_test=True,
            ),
        ]
    if first.evaluates:
        stages += _judged_answers(first, data, settings, settings.rounds)
    return [*stages, report_stage(recipe, settings, "Online rounds"), *around.after]


def _judged_answers(recipe: Recipe, data: Path, settings: OnlineSettings, number: int) -> list[Stage]:
    """The stages that need no training: what a model answers, and what is thought of it."""
    return [
        answers_stage(recipe, data, settings, number),
        _judged_stage(recipe, settings, number),
        *measured_stages(recipe, settings, number),
    ]


def _judged_stage(recipe: Recipe, settings: OnlineSettings, number: int) -> MakeStage:
    answers, folder = answers_folder(recipe, number), round_folder(recipe, number) / JUDGED

    def make() -> Any:
        from prefopt.procedures.judging import judge_answers
        from prefopt.procedures.pairing import write_figures

        parts = [part for part in (OWN, HELD_OUT) if (answers / part).is_dir()]
        figures = {part: judge_answers(settings.judge, answers / part, folder / part) for part in parts}
        on_main(lambda: write_figures(folder, figures))
        for part, values in figures.items():
            say(f"judged, {part}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        return figures

    def inputs() -> dict[str, Any]:
        manifests = sorted(answers.glob("*/manifest.json"))
        return {**judge_facts(settings.judge), "answers": {path.parent.name: sha256_of(path) for path in manifests}}

    told = ", ".join(f"{name} {value}" for name, value in settings.judge.items())
    return MakeStage(
        f"judged-{number}", folder, make, {}, on_every_rank=True, inputs=inputs, summary=f"scores by the judge: {told}"
    )


def _pairs_stage(recipe: Recipe, data: Path, settings: OnlineSettings, number: int) -> MakeStage:
    judged, folder = round_folder(recipe, number) / JUDGED, round_folder(recipe, number) / "pairs"

    def make() -> Any:
        from prefopt.procedures.judging import best_against_worst

        found = {}
        for part, file, name in ((OWN, TRAIN, PAIRS), (HELD_OUT, TEST, TEST_PAIRS)):
            if (data / file).is_file():
                examples = read_data(data / file)
                rows, counts = best_against_worst(examples, judged / part, sample_targets=settings.sample_targets)
                why_none = f"the judge prefers no answer to {file}"
                if part == HELD_OUT:
                    write_held_out(folder / name, rows, why_none)
                elif rows:
                    write_rows(folder / name, rows)
                else:
                    raise UserError(f"round {number}: {why_none}, so there are no pairs")
                said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
                say(f"round {number}, {part}: {said}")
                found[part] = dict(counts)
        return found

    return MakeStage(
        f"pairs-{number}",
        folder,
        make,
        {"sample_targets": settings.sample_targets},
        summary=f"pairs of the best and the worst of {settings.samples} answers",
    )
