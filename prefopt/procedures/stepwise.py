"""Stepwise DPO (sDPO, arXiv 2403.19270): the data in chunks, one after the other, around any loss over pairs.

Each step is a fresh run on its chunk, with the model of the step before as its start and as its reference. By default
the chunks come easy to hard, as the start model finds them without a reference: with itself as the reference every
reward would be 0. The paper's chunks are whole data sets, and it gives no code; rows of one source that are ordered by
their own easiness are an extension of this package.

What to know before using it: on a random partition the paper's result (72.56 on its six tasks) is below that of DPO on
everything at once (72.67), so the order matters; and since every reference moves, the last model drifts further from
the first one than a run at once with the same beta, so compare at equal KL, not at equal beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from prefopt.console import say
from prefopt.errors import RecipeError, nearest
from prefopt.losses import get
from prefopt.losses.knobs import knobs_of
from prefopt.procedures.chunks import (
    EASY,
    ORDERS,
    RANDOM,
    TEST,
    Cut,
    chunk_file,
    load_rows,
    order_chunks,
    read_cut,
    write_chunks,
)
from prefopt.procedures.easiness import LENGTHS, easiness
from prefopt.procedures.inputs import contents_of
from prefopt.procedures.single import with_start
from prefopt.procedures.small_world import Surroundings, with_pairs
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, procedure, refuse_unknown
from prefopt.recipe.sections import DataSection, ModelSection

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

BETA = "beta"
PER_STEP = (BETA, "learning_rate", "num_train_epochs")
# What decides how the rows are read and measured, beside data and model.
_READING = (
    "max_length", "truncation_mode", "cut_answers", "min_prompt_tokens", "prompt_boundary", "identical_pairs",
    "chat_template_kwargs", "on_bad_row", "max_bad_rows", "bf16", "seed",
)  # fmt: skip
_DRIFT = "stepwise: every step's reference moves, so the drift from the start model adds up over the steps"
_RANDOM = "stepwise: in the paper chunks in random order did no better than one run on everything"


@dataclass(frozen=True)
class Plan:
    """The settings of the procedure: how data is cut, in which `order` it comes, and the values of each step.

    `length`: `sum` or `mean` of the log-probabilities over an answer's tokens, for the order.
    """

    cut: Cut
    order: str
    length: str
    values: dict[str, tuple[float, ...]]

    @property
    def measures(self) -> bool:
        """Whether the order has to be found out."""
        return self.order == EASY and self.cut.count > 1


@procedure("stepwise")
def stepwise(recipe: Recipe) -> Sequence[Stage]:
    """`procedure: {chunks: ..., order: ..., length: ..., beta: [...], learning_rate: [...], num_train_epochs: [...]}`.

    `start: {...}` puts a supervised stage before, and `world: {...}` the small world, as in their own procedures. The
    chunks are written to `<output_dir>/chunks`; the last step's model lies in `output_dir` itself.
    """
    refuse_unknown(recipe, "chunks", "order", "length", "start", "world", *PER_STEP)
    around = _surroundings(recipe)
    base = around.recipe
    plan = _settings(recipe, base)
    folder = Path(recipe.output_dir) / "chunks"
    written = {name: recipe.procedure.get(name) for name in ("chunks", "order", "length")}
    chunks = MakeStage(
        "chunks",
        folder,
        lambda: make_chunks(base, plan, folder),
        {**written, **_facts(base)},
        on_every_rank=True,
        inputs=lambda: contents_of(base),
        summary=_summary(plan),
    )
    steps = [TrainStage(f"step-{step}", _step(base, plan, folder, step)) for step in range(1, plan.cut.count + 1)]
    report = MakeStage(
        "report",
        folder,
        lambda: _report(recipe, steps, folder, plan.length),
        {"length": plan.length},
        on_every_rank=True,
        summary="what each step's start model made of its chunk: one forward pass over the rows",
    )
    return [*around.before, chunks, *steps, report, *around.after]


def make_chunks(recipe: Recipe, plan: Plan, folder: Path) -> dict[str, Any]:
    """Cut the data of a recipe into files of `folder`, measured by the recipe's model where the order asks for it.

    Returns what `chunks.json` holds. Every rank calls it. Raises `DataError` when the cut does not fit the data.
    """
    if plan.cut.count > 1:
        say(_DRIFT, *([_RANDOM] if plan.order == RANDOM else []))
    rows, gaps = load_rows(recipe, plan.cut), None
    if plan.measures:
        from prefopt.procedures.measuring import answer_gaps

        gaps = answer_gaps(recipe, rows.train, rows.report)
    seed = recipe.training_arguments().seed
    chunks = order_chunks(plan.cut, rows, plan.order, gaps=gaps, length=plan.length, seed=seed)
    listed = [
        {
            "name": chunk.name,
            "file": chunk_file(step),
            "rows": len(chunk.examples),
            "measured": None if gaps is None else easiness(chunk.examples, gaps, plan.length),
        }
        for step, chunk in enumerate(chunks, start=1)
    ]
    made = {
        "order": plan.order,
        "length": plan.length,
        "chunks": listed,
        "rows": len(rows.train),
        "test_rows": None if rows.test is None else len(rows.test),
    }
    if PartialState().is_main_process:
        write_chunks(folder, chunks, rows.test, made)
    say(*(f"chunk {step}: {_line(entry)}" for step, entry in enumerate(listed, start=1)))
    return made


def _surroundings(recipe: Recipe) -> Surroundings:
    """What stands around the steps: the small world, a supervised start, or nothing."""
    given = recipe.procedure
    if "world" in given:
        return with_pairs(recipe)
    if not any((recipe.data.dataset_name, recipe.data.data_files, recipe.data.datasets)):
        raise RecipeError("dataset_name: is missing. Write dataset_name, or data_files: [easy.jsonl, hard.jsonl].")
    if "start" in given:
        start, main = with_start(recipe, given["start"] or {})
        return Surroundings([start], main.recipe, [])
    if recipe.model.from_scratch is not None:
        raise RecipeError("from_scratch: the steps need a model that has learnt something. Write procedure.start.")
    return Surroundings([], recipe.replace(procedure={}), [])


def _settings(recipe: Recipe, base: Recipe) -> Plan:
    given = recipe.procedure
    if not base.objective().paired_required:
        names = " and ".join(loss.name for loss in base.loss)
        raise RecipeError(f"procedure: stepwise needs a loss over pairs, and {names} reads single answers.")
    if base.reference.model is not None:
        raise RecipeError("reference.model: the reference of each step is the model it starts from. Remove it.")
    cut = read_cut(given.get("chunks"), base.data)
    order = _choice(given, "order", ORDERS)
    length = _choice(given, "length", LENGTHS)
    values = {name: _values(name, given[name], cut.count) for name in PER_STEP if given.get(name) is not None}
    if BETA in values and not any(_has_beta(loss.name) for loss in base.loss):
        raise RecipeError(f"procedure.beta: {base.loss[0].name} has no beta. Remove it.")
    return Plan(cut, order, length, values)


def _choice(given: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = str(given.get(name, known[0]))
    if value not in known:
        raise RecipeError(f"procedure.{name}: `{value}` is not one of {', '.join(known)}.{nearest(value, known)}")
    return value


def _values(name: str, given: Any, steps: int) -> tuple[float, ...]:
    values = given if isinstance(given, list) else [given]
    if not values or not all(type(value) in (int, float) and value > 0 for value in values):
        raise RecipeError(f"procedure.{name}: must be numbers above 0, one for each step, not {given!r}.")
    if len(values) > steps:
        raise RecipeError(f"procedure.{name}: has {len(values)} values, and there are {steps} steps.")
    return tuple(values)


def _has_beta(loss: str) -> bool:
    return any(knob.name == BETA for knob in knobs_of(get(loss)))


def _step(base: Recipe, plan: Plan, folder: Path, step: int) -> Recipe:
    """The recipe of one step: its chunk, the model of the step before, and its own values."""
    last = step == plan.cut.count
    train = str(folder / chunk_file(step))
    data = {"train": train, "test": str(folder / TEST)} if base.evaluates else train
    changes: dict[str, Any] = {
        **{field.name: None for field in fields(DataSection) if field.name != "targets"},
        "data_files": data,
        "logging_first_step": True,  # its loss is that of zero margin, and stands in the report
        **{name: _at(values, step) for name, values in plan.values.items() if name != BETA},
    }
    if BETA in plan.values:
        blocks = [_with_beta(loss.name, loss.knobs, _at(plan.values[BETA], step)) for loss in base.loss]
        changes["loss"] = blocks if len(blocks) > 1 else blocks[0]
    if step > 1:
        changes |= {"model_name_or_path": _folder(base, step - 1), "model_revision": None, "from_scratch": None}
    if not last:
        # A checkpoint that is named is one of the last step, whose folder is the recipe's own.
        resume = "never" if base.training.get("resume") == "never" else "auto"
        changes |= {"output_dir": _folder(base, step), "resume": resume, "push_to_hub": False}
    return base.replace(changes)


def _folder(base: Recipe, step: int) -> str:
    return f"{base.output_dir}/step-{step}"


def _at(values: Sequence[float], step: int) -> float:
    """The value of a step; the last one goes on."""
    return values[min(step, len(values)) - 1]


def _with_beta(loss: str, knobs: dict[str, Any], beta: float) -> dict[str, Any]:
    return {"name": loss, **knobs, **({BETA: beta} if _has_beta(loss) else {})}


def _facts(base: Recipe) -> dict[str, Any]:
    """The settings that decide what is in the chunks."""
    names = {*_READING, *(field.name for section in (DataSection, ModelSection) for field in fields(section))}
    resolved = base.resolved()
    return {name: resolved[name] for name in sorted(names) if name in resolved}


def _summary(plan: Plan) -> str:
    order = {EASY: "easy to hard", RANDOM: "in random order"}.get(plan.order, "in the given order")
    cost = ", found by one forward pass of the start model over all rows" if plan.measures else ""
    return f"{plan.cut.text}, {order}{cost}"


def _line(entry: dict[str, Any]) -> str:
    known = entry["measured"]
    figures = f", accuracy {known['accuracy']:.3f}, gap {known['gap']:+.2f} nats" if known and known["pairs"] else ""
    return f"{entry['name']}, {entry['rows']} rows{figures}"


def _report(recipe: Recipe, steps: Sequence[TrainStage], folder: Path, length: str) -> Any:
    from prefopt.procedures.stepwise_report import report

    return report(recipe, steps, folder, length)
