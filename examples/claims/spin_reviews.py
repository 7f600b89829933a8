"""SPIN towards kind film reviews, against more supervised epochs and against one long round (arXiv 2401.01335).

    python examples/claims/spin_reviews.py [--seeds 3] --data FOLDER   # of reviews_pos.txt and reviews_neg.txt

A small model learnt all the reviews. The data of SPIN are the kind ones among them, by one judge of sentiment: three
rounds of fifty steps, as spin_reviews.yaml says. Beside it, from the same start and for as many steps: supervised
training on the kind reviews, and one round of 150 steps. Measured on openings never seen, by that judge and by another
one that chose nothing; with the KL to the start, and the log-likelihood of kind reviews that were held out. Without
--data the reviews are those of the embedded world. Base model and data stay in runs/reviews, the runs in
runs/spin_reviews, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import conclude, options, show, told
from reviews import SMALL, TINY, World, answer_rows, make_world, write_rows

from prefopt.losses import load_plugin
from prefopt.models import load_model
from prefopt.procedures import make_plan, run_plan
from prefopt.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
KIND = 1.0  # of the first judge, from which on a review is one of the data
ROUNDS, STEPS = 3, 50
WORLD, RUNS = Path("runs/reviews"), Path("runs/spin_reviews")
SHOWN = {
    "reward": "judge",
    "judge": "other judge",
    "logp": "log-likelihood/token",
    "kl": "KL to the start, nats",
    "length": "tokens",
    "distinct": "distinct-2",
}
START, *_, LAST = AFTER = ("start", *(f"round {number}" for number in range(1, ROUNDS + 1)))
MORE, LONG = "supervised, as many steps", "one round, as many steps"
SUPERVISED: dict[str, Any] = {"loss": {"name": "sft"}, "procedure": {}}


def main() -> None:
    """Print the table, and which parts of the claim were seen."""
    given = options(__doc__, default=3)
    world = prepare(given)
    found = [run(world, seed, 2 if given.quick else STEPS) for seed in range(given.seeds)]
    lines = [[row, *(told([each[row][name] for each in found]) for name in SHOWN)] for row in (*AFTER, MORE, LONG)]
    show(["", *SHOWN.values()], lines)
    _verdicts(found)


def prepare(given: argparse.Namespace) -> World:
    """The world, with the kind reviews as files of answers beside its base model."""
    WORLD.mkdir(parents=True, exist_ok=True)
    os.environ["REVIEWS"] = str(given.data or "")
    load_plugin(HERE / "sentiment.py")
    world = make_world(WORLD, given.data, TINY if given.quick else SMALL)
    for name, texts in (("kind", world.texts), ("held_out_kind", world.held_out)):
        kind = answer_rows(world, [text for text in texts if world.reward(text) > KIND])
        write_rows(WORLD / f"{name}.jsonl", kind)
        print(f"{len(kind):,} rows in {WORLD / name}.jsonl")
    return world


def run(world: World, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """The figures of all models of one seed."""
    folder = RUNS / f"seed-{seed}"
    shared = ["--seed", str(seed), "--report_to", "none", "--disable_tqdm", "true"]
    recipe = load_recipe(HERE / "spin_reviews.yaml", shared)
    spin, more, long = folder / "spin", folder / "more", folder / "long"
    rounds = {**recipe.procedure, "max_new_tokens": world.size.new_tokens}
    _run(recipe, spin, max_steps=steps, procedure=rounds)
    _run(recipe, long, max_steps=ROUNDS * steps, procedure={**rounds, "rounds": 1})
    _run(recipe, more, max_steps=ROUNDS * steps, **SUPERVISED)
    # A plan of its own only to be measured: what the stages of data and answers do to any model.
    measured = recipe.replace(model_name_or_path=str(more), output_dir=f"{more}_measured", procedure=rounds)
    run_plan(make_plan(measured)[:2])
    left = {
        START: (world.folder / "base", spin, 0),
        **{f"round {number}": (spin / f"round-{number - 1}", spin, number) for number in range(1, ROUNDS)},
        LAST: (spin, spin, ROUNDS),
        MORE: (more, Path(f"{more}_measured"), 0),
        LONG: (long, long, 1),
    }
    return {name: _figures(world, *place, seed) for name, place in left.items()}


def _run(recipe: Recipe, folder: Path, **settings: Any) -> None:
    run_plan(make_plan(recipe.replace(output_dir=str(folder), **settings)))


def _figures(world: World, model: Path, plan: Path, number: int, seed: int) -> dict[str, float]:
    """What a model does on the held-out openings; `plan` has its likelihoods, as the model of round `number`."""
    measured = json.loads((plan / f"round-{number}" / "answers" / "figures.json").read_text())["held_out"]
    found = asdict(world.measure(load_model(str(model)), world.base(), seed=1000 + seed))
    return {**found, "logp": measured["real_logp_per_token"]}


def _verdicts(found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    def mean(row: str, figure: str) -> float:
        return statistics.fmean(each[row][figure] for each in found)

    for name in ("reward", "judge"):
        rising = [mean(row, name) for row in AFTER]
        conclude(f"{SHOWN[name]}: kinder in each round", rising == sorted(set(rising)))
        for row in (MORE, LONG):
            conclude(f"{SHOWN[name]}: kinder after three rounds than: {row}", rising[-1] > mean(row, name))
    conclude("held-out kind reviews are likelier than at the start", mean(LAST, "logp") > mean(START, "logp"))


if __name__ == "__main__":
    main()
