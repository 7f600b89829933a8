"""The account of a stepwise run: what each step's start model made of its chunk, in results, card, table and plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from prefopt.console import say
from prefopt.data.sources import load_examples
from prefopt.hub.pushes import push_again
from prefopt.procedures.chunks import REPORT
from prefopt.procedures.easiness import easiness
from prefopt.procedures.measuring import answer_gaps
from prefopt.procedures.stage import TrainStage
from prefopt.report.card import write_card
from prefopt.report.plots import save_levels
from prefopt.report.results import METRICS_FILE, RESULTS_FILE, read_metrics, write_results

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

PLOT = "steps"
_HEADS = ("step", "chunk", "pairs", "accuracy before", "gap before", "first loss", "last loss", "eval accuracy")
_BEFORE = (
    "`before`: the model that the step starts from, without a reference; the gap is log p(chosen) - log p(rejected) in "
    "nats a pair. `eval accuracy` is of rewards against the step's own reference."
)


def report(recipe: Recipe, steps: Sequence[TrainStage], chunks: Path, length: str) -> list[dict[str, Any]]:
    """Measure each step's start model on its chunk, and add the steps to `results.json` and card of the whole run.

    `recipe` is that of the whole run, `chunks` the folder of its chunks. The list has one entry for each step; every
    rank calls this and gets it.
    """
    listed = json.loads((chunks / REPORT).read_text(encoding="utf-8"))["chunks"]
    entries = [
        # The first step's chunk was measured by the model it starts from where the order was found out.
        {"step": number, **_entry(stage, chunk, chunk["measured"] if number == 1 else None, length)}
        for number, (stage, chunk) in enumerate(zip(steps, listed, strict=True), start=1)
    ]
    table = steps_table(entries)
    if PartialState().is_main_process:
        _write(recipe, entries, table)
        push_again(Path(recipe.output_dir), recipe.training)
    say("", *table)
    return entries


def steps_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps as lines of a Markdown table."""
    rows = [
        [
            str(entry["step"]),
            str(entry["chunk"]),
            str(entry["before"]["pairs"]),
            _number(entry["before"]["accuracy"], ".3f"),
            _number(entry["before"]["gap"], "+.2f"),
            _number(entry["first_loss"], ".4f"),
            _number(entry["last_loss"], ".4f"),
            _number(entry["eval_accuracy"], ".3f"),
        ]
        for entry in entries
    ]
    widths = [max(len(row[place]) for row in [_HEADS, *rows]) for place in range(len(_HEADS))]
    rule = ["-" * width for width in widths]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in [_HEADS, rule, *rows]
    ]


def _entry(stage: TrainStage, chunk: Mapping[str, Any], before: Any, length: str) -> dict[str, Any]:
    """What is known of a step: from its run folder, and by a forward pass of the model it started from."""
    results = json.loads((stage.folder / RESULTS_FILE).read_text(encoding="utf-8"))
    losses = [event["loss"] for event in read_metrics(stage.folder / METRICS_FILE) if "loss" in event]
    return {
        "chunk": chunk["name"],
        "folder": str(stage.folder),
        "before": before or _measured(stage.recipe, length),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_accuracy": results["eval"].get("eval_rewards/accuracies"),
        "steps": results["steps"],
        "tokens": results["tokens"],
        "reference": results["reference"],
    }


def _measured(recipe: Recipe, length: str) -> dict[str, Any]:
    args = recipe.training_arguments()
    rules = {"on_bad_row": args.on_bad_row, "max_bad_rows": args.max_bad_rows}
    loaded = load_examples(recipe.data.spec(evaluate=False), **rules)
    return easiness(loaded.examples, answer_gaps(recipe, loaded.examples, loaded.report), length)


def _write(recipe: Recipe, entries: list[dict[str, Any]], table: Sequence[str]) -> None:
    folder = Path(recipe.output_dir)
    file = folder / RESULTS_FILE
    write_results(folder, {**json.loads(file.read_text(encoding="utf-8")), "stepwise": entries})
    recipe.dump(folder / "recipe.yaml")
    steps = [entry["step"] for entry in entries]
    save_levels(
        folder,
        PLOT,
        "step",
        steps,
        {
            "Accuracy before the step (share of pairs)": [entry["before"]["accuracy"] for entry in entries],
            "Gap before the step (nats a pair)": [entry["before"]["gap"] for entry in entries],
        },
    )
    docs = {loss.name: type(loss).__doc__ or "" for loss in recipe.objective().losses}
    note = "\n".join(["Trained step by step (stepwise DPO, arXiv 2403.19270). " + _BEFORE, "", *table])
    base = recipe.model.model_name_or_path
    write_card(folder, recipe.resolved(), base_model=base, loss_docs=docs, note=note)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
