"""The models of all rounds in an environment, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefopt.console import say
from prefopt.procedures.answers import figures_of_round
from prefopt.procedures.episodes import count_again
from prefopt.procedures.exploring import EXPLORED, ExploringSettings
from prefopt.procedures.rounds import round_folder
from prefopt.recipe import Recipe
from prefopt.report.plots import BLUE, GREY, Curve, Panel
from prefopt.report.results import write_whole
from prefopt.report.rounds import write_rounds

COLUMNS = {
    "round": "round",
    "held_out/reward": "reward",
    "held_out/success": "success",
    "held_out/turns": "turns",
    "held_out/ties": "ties",
    "held_out/cut_off": "cut off",
    "own/reward": "reward, train",
    "own/success": "success, train",
    "own/turns": "turns, train",
    "own/turn_limit": "turn limit, train",
    "own/ties": "ties, train",
    "own/cut_off": "cut off, train",
    "train/pairs": "pairs",
    "train/loss": "loss",
    "train/rewards/accuracies": "accuracy",
}
NOTE = (
    "Each row is the model that a round starts from, the last one the model that is left: the mean reward of its "
    "episodes, the share that succeeds, the turns it takes, the share of tasks on which it earns what the expert does, "
    "and the share of episodes that stop before a turn that was cut off, held no text or had no room left; then the "
    "last figures of the training that made the model."
)


def _panel(name: str, title: str, axis: str, *, share: bool = False) -> Panel:
    curves = (
        Curve(f"held_out/{name}", "held-out tasks", BLUE, noisy=False),
        Curve(f"own/{name}", "training tasks", GREY, noisy=False),
    )
    return Panel(name, title, axis, curves, limits=(-0.03, 1.03)) if share else Panel(name, title, axis, curves)


PANELS = (
    _panel("reward", "Reward", "mean over episodes"),
    _panel("success", "Success", "share of episodes", share=True),
    _panel("turns", "Turns of the agent", "mean over episodes"),
    _panel("ties", "Ties with the expert", "share of tasks", share=True),
    _panel("cut_off", "Episodes cut off", "share of episodes", share=True),
)


def report(recipe: Recipe, settings: ExploringSettings, folder: Path) -> list[dict[str, Any]]:
    """Lay the models of all rounds side by side in the run's report, and on the screen; their figures."""
    for number in range(settings.rounds + 1):
        count_again(round_folder(recipe, number) / EXPLORED, settings.success)
    rows = [figures_of_round(recipe, settings, number) for number in range(settings.rounds + 1)]
    rows = [row for row in rows if len(row) > 1]
    write_whole(folder / "rounds.json", json.dumps(rows, indent=1) + "\n")
    table = write_rounds(Path(recipe.output_dir), rows, COLUMNS, PANELS, NOTE)
    say("Rounds in the environment, the model at the start of each round:", table)
    return rows
