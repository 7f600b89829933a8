"""Stepwise DPO on film reviews: easy pairs first, hard ones first, in random order, or all at once (arXiv 2403.19270).

    python examples/claims/stepwise_reviews.py [--seeds 3] --data FOLDER   # of reviews_pos.txt and reviews_neg.txt

A small model that learnt the reviews answers 800 openings four times, and a judge of sentiment says of each two answers
which is kinder. The pairs are one source, cut in three by how easy the start model finds them; the paper's chunks are
whole data sets. All ways take as many steps of the optimizer, with the settings of stepwise_reviews.yaml. Measured on
openings never seen: by that judge and by another one, the KL to the start, and on held-out pairs the accuracy of the
rewards against the start (at the start itself they are rounding). Every reference moves, so steps drift further than
one run of the same beta: read reward beside KL. Without --data the reviews are those of the embedded world. Model and
pairs stay in runs/reviews, the runs in runs/stepwise_reviews, and the same command goes on with what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common import conclude, options, show, told
from reviews import SMALL, TINY, World, accuracy, make_world, pair_rows, write_rows

from prefopt.models import load_model
from prefopt.procedures import make_plan, run_plan
from prefopt.recipe import Recipe, load_recipe

WORLD, RUNS = Path("runs/reviews"), Path("runs/stepwise_reviews")
SHOWN = {
    "reward": "judge",
    "judge": "other judge",
    "kl": "KL to the start, nats",
    "accuracy": "accuracy",
    "length": "tokens",
}
START, ONCE, EASY, HARD, RANDOM = "start", "all at once", "easy to hard", "hard to easy", "random thirds"


def main() -> None:
    """Print the table, and whether the order matters as the paper found."""
    given = options(__doc__, default=3)
    WORLD.mkdir(parents=True, exist_ok=True)
    world = make_world(WORLD, given.data, TINY if given.quick else SMALL)
    rows = pair_rows(world)
    write_rows(WORLD / "pairs.jsonl", rows)
    print(f"{len(rows):,} pairs in {WORLD}/pairs.jsonl, {len(world.held_out_pairs)} held out")
    found = [run(world, seed) for seed in range(given.seeds)]
    lines = [[row, *(told([each[row][name] for each in found]) for name in SHOWN)] for row in found[0]]
    show(["", *SHOWN.values()], lines)
    _verdicts(found)


def run(world: World, seed: int) -> dict[str, dict[str, float]]:
    """The figures of all ways, trained with one seed."""
    folder = RUNS / f"seed-{seed}"
    shared = ["--seed", str(seed), "--report_to", "none", "--disable_tqdm", "true"]
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), shared)
    easy = recipe.procedure
    # The chunks of the first way, the other way round.
    reverse = [f"{folder}/easy/chunks/chunk-{number}.jsonl" for number in (3, 2, 1)]
    ways = {
        EASY: _train(recipe, folder / "easy"),
        HARD: _train(
            recipe, folder / "hard", data_files=reverse, procedure={**easy, "chunks": "datasets", "order": "given"}
        ),
        RANDOM: _train(recipe, folder / "random", procedure={**easy, "order": "random"}),
        ONCE: _train(recipe, folder / "once", procedure={}),
    }
    return {name: _figures(world, model, seed) for name, model in {START: world.folder / "base", **ways}.items()}


def _train(recipe: Recipe, folder: Path, **settings: object) -> Path:
    run_plan(make_plan(recipe.replace(output_dir=str(folder), **settings)))
    return folder


def _figures(world: World, model: Path, seed: int) -> dict[str, float]:
    policy, base = load_model(str(model)), world.base()
    return {**asdict(world.measure(policy, base, seed=1000 + seed)), "accuracy": accuracy(world, policy, base)}


def _verdicts(found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    for other in (ONCE, RANDOM, HARD):
        for name in ("reward", "judge", "accuracy"):
            gains = [each[EASY][name] - each[other][name] for each in found]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            ahead = len(gains) > 1 and statistics.fmean(gains) > 2 * spread / len(gains) ** 0.5
            conclude(f"{SHOWN[name]}: easy to hard beats {other} by more than two standard errors", ahead)


if __name__ == "__main__":
    main()
