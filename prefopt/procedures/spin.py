"""SPIN, self-play fine-tuning (arXiv 2401.01335): in each round the model learns to prefer the data's own answers.

Round t lets model t answer the prompts once, pairs each of the data's answers with that one, trains from model t with
model t as the reference, and so makes model t + 1. From the second round on the pairs of the round before are trained
on as well; their reference scores are those of the new reference.

The paper's lambda is the loss's `beta`. With the exact minimiser of a round,
log p_(t+1) - log p_data = (1 - 1 / beta) (log p_t - log p_data) up to a constant (Theorem 5.4). That shrinks for beta
above 1/2 alone, and is 0 at beta = 1: at the published 0.1 rounds work because each is stopped long before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.data.formats import Example
from prefopt.data.messages import is_answer
from prefopt.errors import RecipeError, UserError
from prefopt.generation import read_generations
from prefopt.procedures.pairing import TEST, TRAIN, as_answer, pair_row, read_data, write_held_out, write_rows
from prefopt.procedures.round_stages import (
    answers_stage,
    data_stage,
    measured_stages,
    report_stage,
    supervised_start,
    surroundings,
)
from prefopt.procedures.rounds import (
    BETA,
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
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, procedure

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

# The paper's (beta of the last round, learning rates and epochs included), for as many rounds.
PAPER: dict[str, Any] = {
    "rounds": 4,
    "beta": (0.1, 0.1, 0.1, 5.0),
    "learning_rate": (5e-7, 5e-7, 1e-7, 1e-7),
    "num_train_epochs": (2.0,),
}
CONTRACTS_ABOVE = 0.5
_WHY_NONE = "every answer of the model is blank or no text, or the data's own"
MANY_EPOCHS = 5  # passes over the same pairs from which on a round is taken to be trained to convergence


@dataclass(frozen=True)
class SpinSettings(RoundSettings):
    """`history_window`: of how many rounds the answers are trained on, this one's included. `append_eos_to_truncated`:
    an answer that was cut off at `max_new_tokens` is trained on as if it had ended there, as the authors' code does.
    """

    history_window: int = 2
    append_eos_to_truncated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history_window", self.history_window)
        if not isinstance(self.append_eos_to_truncated, bool):
            raise RecipeError("procedure.append_eos_to_truncated: must be true or false.")

    def window(self, round: int) -> range:
        """The rounds whose answers a round trains on."""
        return range(max(0, round - self.history_window + 1), round + 1)


@procedure("spin")
def spin(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {name: spin, rounds: 4, ...}`: `SpinSettings`, and `start: {...}` for a supervised stage before.

    The data are answers: `prompt` and `completion`, or `messages`; with `world: {...}` those of the small world. The
    stages of round t are `answers-t` (sampled, and the model measured), `measured-t` where there is something to
    `measure`, `pairs-t` and `train-t`; after the last one the final model is measured and all is reported.
    """
    settings = read_settings(SpinSettings, recipe, besides=("start", "world"), defaults=PAPER)
    refuse_other_reference(recipe)
    if not recipe.objective().paired_required:
        raise RecipeError("loss: SPIN compares two answers, and this loss reads single ones. Write loss: {name: dpo}.")
    around, data = surroundings(recipe, settings), Path(recipe.output_dir) / "data"
    stages: list[Stage] = [*around.before, data_stage(around.recipe, data, settings, answers=True)]
    first = around.recipe
    if "start" in recipe.procedure:
        start, first = supervised_start(around, data)
        stages.append(start)
    for number in range(settings.rounds):
        own = round_recipe(first, settings, number, has_test=first.evaluates)
        most = settings.prompts and settings.prompts * len(settings.window(number))
        trained = TrainStage(f"train-{number}", own, most_rows=most, made_test=True)
        stages += [
            answers_stage(first, data, settings, number),
            *measured_stages(first, settings, number),
            _pairs_stage(first, trained.recipe, data, settings, number),
            trained,
        ]
    if first.evaluates:
        stages += [
            answers_stage(first, data, settings, settings.rounds),
            *measured_stages(first, settings, settings.rounds),
        ]
    return [*stages, report_stage(recipe, settings, "SPIN"), *around.after]


def _pairs_stage(recipe: Recipe, trained: Recipe, data: Path, settings: SpinSettings, number: int) -> MakeStage:
    folder = round_folder(recipe, number) / "pairs"

    def make() -> Any:
        _warn(trained)
        return make_pairs(recipe, data, folder, settings, number)

    facts = {"window": list(settings.window(number)), "append_eos_to_truncated": settings.append_eos_to_truncated}
    rounds = ", ".join(f"answers-{source}" for source in settings.window(number))
    told = f"pairs of the data's answers and the model's own, of {rounds}"
    return MakeStage(f"pairs-{number}", folder, make, facts, summary=told)


def make_pairs(recipe: Recipe, data: Path, folder: Path, settings: SpinSettings, number: int) -> dict[str, int]:
    """Write the pairs of a round: the data's answers against those of the rounds in its window.

    Held-out pairs are of this round alone. Returns counts: pairs, those of earlier rounds, those whose sampled answer
    was cut off, and answers left out: blank ones, ones no file can hold as text, and the data's own.
    """
    counts: Counter[str] = Counter()
    examples, rows = read_data(data / TRAIN), []
    for source in settings.window(number):
        records = read_generations(answers_folder(recipe, source) / OWN)
        made = _pairs(examples, records, source, settings, counts)
        counts["of earlier rounds"] += len(made) if source < number else 0
        rows += made
    if not rows:
        raise UserError(
            f"round {number}: no pair could be made: {_WHY_NONE}. Look at them in {answers_folder(recipe, number)}"
        )
    write_rows(folder / PAIRS, rows)
    counts["pairs"] = len(rows)
    if (data / TEST).is_file():
        records = read_generations(answers_folder(recipe, number) / HELD_OUT)
        held_out = _pairs(read_data(data / TEST), records, number, settings, Counter())
        write_held_out(folder / TEST_PAIRS, held_out, _WHY_NONE)
    say(f"round {number}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
    write_rows(folder / "counts.json", [dict(counts)])
    return dict(counts)


def _pairs(
    examples: Sequence[Example],
    records: Iterable[dict[str, Any]],
    source: int,
    settings: SpinSettings,
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """Rows of one round's answers; `round` says which."""
    rows = []
    for record in records:
        example = examples[record["prompt_index"]]
        answer = as_answer(example, record["text"])
        if not is_answer(record["text"]):
            counts["left out, blank or no text"] += 1
            continue
        if answer == example.completion:
            counts["left out, the data's own"] += 1
            continue
        counts["cut off"] += not record["finished"]
        open_end = ["chosen"] if example.unfinished else []
        open_end += [] if record["finished"] or settings.append_eos_to_truncated else ["rejected"]
        rows.append(pair_row(example, example.completion, answer, unfinished=open_end, round=source))
    return rows


def _warn(recipe: Recipe) -> None:
    """Say that rounds which are trained to convergence drive the model away from the data at a small beta."""
    epochs = float(recipe.resolved()["num_train_epochs"])
    betas = [loss[BETA] for loss in _loss_blocks(recipe) if BETA in loss]
    if betas and min(betas) < CONTRACTS_ABOVE and epochs >= MANY_EPOCHS:
        say(
            f"SPIN: {epochs:g} epochs at beta {min(betas):g}. A round that is trained to convergence moves the model "
            f"away from the data where beta is below {CONTRACTS_ABOVE:g}: write beta 1 or more, or fewer epochs"
        )


def _loss_blocks(recipe: Recipe) -> list[dict[str, Any]]:
    loss = recipe.resolved()["loss"]
    return loss if isinstance(loss, list) else [loss]
