"""Rounds on the model's own answers: sample some to each prompt, judge them, train on the best against the worst.

With the loss of DPO this is iterative DPO (arXiv 2312.16682, 2405.07863); with a judge that is the model itself,
self-rewarding (arXiv 2401.10020). The reference of each round is the model that the round starts from, whose answers
it is trained on. Answers that were cut off are not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.errors import RecipeError, UserError
from prefopt.judges import check_judge, judge_facts, refuse_unready
from prefopt.procedures.exploring import exploring
from prefopt.procedures.inputs import sha256_of
from prefopt.procedures.pairing import TEST, TRAIN, read_data, write_rows
from prefopt.procedures.round_stages import answers_stage, data_stage, report_stage
from prefopt.procedures.rounds import (
    HELD_OUT,
    OWN,
    PAIRS,
    TEST_PAIRS,
    RoundSettings,
    answers_folder,
    check_count,
    read_settings,
    refuse_no_data,
    refuse_other_reference,
    round_folder,
    round_recipe,
)
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, procedure

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
    def samples(self) -> int:
        return self.samples_per_prompt


@procedure("online")
def online(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {name: online, rounds: 3, judge: {...}, ...}`: `OnlineSettings`.

    The data are prompts; answers in their rows are not read. The stages of round t are `answers-t`, `judged-t`,
    `pairs-t` and `train-t`; after the last one the final model answers and is judged, and all is reported.
    """
    if "environment" in recipe.procedure:
        return exploring(recipe)
    settings = read_settings(OnlineSettings, recipe)
    refuse_other_reference(recipe)
    refuse_no_data(recipe)
    if recipe.model.model_name_or_path is None:
        raise RecipeError("model_name_or_path: is missing. A model with random weights has no answers to judge.")
    data, rounds = Path(recipe.output_dir) / "data", settings.rounds
    stages: list[Stage] = [_data_stage(recipe, data, settings)]
    for number in range(rounds):
        stages += [
            answers_stage(recipe, data, settings, number),
            _judged_stage(recipe, settings, number),
            _pairs_stage(recipe, data, settings, number),
            TrainStage(f"train-{number}", round_recipe(recipe, settings, number, has_test=recipe.evaluates)),
        ]
    if recipe.evaluates:
        stages += [answers_stage(recipe, data, settings, rounds), _judged_stage(recipe, settings, rounds)]
    return [*stages, report_stage(recipe, settings, "Online rounds")]


def _data_stage(recipe: Recipe, data: Path, settings: OnlineSettings) -> MakeStage:
    """The stage of the prompts, which first refuses a judge that could not be opened after all the sampling."""
    stage = data_stage(recipe, data, settings, answers=False)

    def make() -> Any:
        refuse_unready(settings.judge)
        return stage.make()

    return replace(stage, make=make)


def _judged_stage(recipe: Recipe, settings: OnlineSettings, number: int) -> MakeStage:
    answers, folder = answers_folder(recipe, number), round_folder(recipe, number) / JUDGED

    def make() -> Any:
        from prefopt.procedures.judging import judge_answers
        from prefopt.procedures.pairing import write_figures

        parts = [part for part in (OWN, HELD_OUT) if (answers / part).is_dir()]
        figures = {part: judge_answers(settings.judge, answers / part, folder / part) for part in parts}
        write_figures(folder, figures)
        for part, values in figures.items():
            say(f"judged, {part}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        return figures

    def inputs() -> dict[str, Any]:
        manifests = sorted(answers.glob("*/manifest.json"))
        return {**judge_facts(settings.judge), "answers": {path.parent.name: sha256_of(path) for path in manifests}}

    return MakeStage(f"judged-{number}", folder, make, {}, on_every_rank=True, inputs=inputs)


def _pairs_stage(recipe: Recipe, data: Path, settings: OnlineSettings, number: int) -> MakeStage:
    judged, folder = round_folder(recipe, number) / JUDGED, round_folder(recipe, number) / "pairs"

    def make() -> Any:
        from prefopt.procedures.judging import best_against_worst

        found = {}
        for part, file, name in ((OWN, TRAIN, PAIRS), (HELD_OUT, TEST, TEST_PAIRS)):
            if (data / file).is_file():
                examples = read_data(data / file)
                rows, counts = best_against_worst(examples, judged / part, sample_targets=settings.sample_targets)
                if not rows:
                    raise UserError(f"round {number}: the judge prefers no answer to {file}, so there are no pairs")
                write_rows(folder / name, rows)
                said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
                say(f"round {number}, {part}: {said}")
                found[part] = dict(counts)
        return found

    return MakeStage(f"pairs-{number}", folder, make, {"sample_targets": settings.sample_targets})
