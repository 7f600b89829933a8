"""SPIN over three rounds, against more supervised epochs and against one long round (arXiv 2401.01335).

    python examples/claims/spin_rounds.py [--seeds 3]

A small model learns reviews of the embedded world for one epoch, which is stopped early: not all it writes is
grammatical. Then three rounds of SPIN on 1,500 of the same reviews, no new label anywhere. Beside it, from the same
start: three more supervised epochs on all the reviews, and one round of SPIN with three times the epochs. Measured on
openings never seen: the share of whole answers, and of their sentences, that the grammar could have written, and the
log-likelihood per token of the grammar's own reviews. About six minutes a seed on one core; the runs stay in
runs/spin_rounds.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import conclude, seeds, show, told

from prefopt.generation import read_generations
from prefopt.procedures import make_plan, run_plan
from prefopt.recipe import Recipe, load_recipe
from prefopt.world.grammar import grammatical_share, is_grammatical, write_review
from prefopt.world.stages import held_out_prompts, write_texts

REVIEWS, HELD_OUT, ROUNDS = 3000, 256, 3
FOLDER = Path("runs/spin_rounds")
RECIPE = """\
from_scratch: {{model_type: llama, vocab_size: 1024, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 2,
  num_attention_heads: 4, max_position_embeddings: 256, tie_word_embeddings: true}}
data_files: {{train: {folder}/reviews.jsonl, test: {folder}/held_out.jsonl}}
loss: {{name: dpo}}
procedure:
  name: spin
  rounds: 3
  prompts: 1500
  eval_prompts: 256
  max_new_tokens: 72
  generation_batch_size: 250
  beta: 2.0
  learning_rate: 1.0e-4
  num_train_epochs: 2
lr_scheduler_type: linear
warmup_steps: 0.1
per_device_train_batch_size: 16
max_length: 128
activation_checkpointing: false
save_strategy: "no"
logging_steps: 50
report_to: none
disable_tqdm: true
seed: {seed}
output_dir: {folder}/spin
"""
SUPERVISED = {"loss": {"name": "sft"}, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "num_train_epochs": 1}
SHOWN = {"valid": "grammatical", "sentences": "sentences", "logp": "log-likelihood/token", "tokens": "tokens"}
ROWS = ("start", "round 1", "round 2", "round 3", "three more supervised epochs", "one round of six epochs")


def main() -> None:
    """Print the table, and which parts of the claim were seen."""
    given = seeds(__doc__, default=3)
    found = [run(seed) for seed in given]
    lines = [[row, *(told([each[row][name] for each in found]) for name in SHOWN)] for row in ROWS]
    show(["", *SHOWN.values()], lines)
    _verdicts({row: {name: [each[row][name] for each in found] for name in found[0][row]} for row in ROWS})


def run(seed: int) -> dict[str, dict[str, float]]:
    """The figures of all models of one seed."""
    folder = FOLDER / f"seed-{seed}"
    _write_data(folder, seed)
    recipe = _recipe(folder, seed)
    spin(recipe, f"{folder}/spin", start={**SUPERVISED, "learning_rate": 4e-3})
    start, last = f"{folder}/spin/start", {"from_scratch": None}
    figures = {"start" if row == 0 else f"round {row}": _figures(folder / "spin", row) for row in range(ROUNDS + 1)}
    long = recipe.replace({**last, "model_name_or_path": start})
    spin(long, f"{folder}/long", rounds=1, num_train_epochs=6)
    figures["one round of six epochs"] = _figures(folder / "long", 1)
    # All the reviews, in the way a plain run reads them: they have a label.
    more = long.replace({**SUPERVISED, "learning_rate": 1e-3, "num_train_epochs": 3, "output_dir": f"{folder}/more"})
    run_plan(make_plan(more.replace(procedure={}, data_files=str(folder / "reviews.jsonl"))))
    # A plan of its own only to be measured: what the stage of answers does to any model.
    measured = long.replace(model_name_or_path=f"{folder}/more", output_dir=f"{folder}/more_measured")
    run_plan(make_plan(measured)[:2])
    figures["three more supervised epochs"] = _figures(folder / "more_measured", 0)
    return figures


def spin(recipe: Recipe, output_dir: str, **settings: Any) -> None:
    """Run the recipe's procedure with other settings, or what is missing of it."""
    run_plan(make_plan(recipe.replace(output_dir=output_dir, procedure={**recipe.procedure, **settings})))


def _recipe(folder: Path, seed: int) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(folder=folder, seed=seed))
    return load_recipe(file)


def _write_data(folder: Path, seed: int) -> None:
    write_texts(folder / "reviews.jsonl", REVIEWS, seed)
    rng = random.Random(seed + 1000)
    rows = [{"prompt": prompt, "completion": write_review(prompt, rng)} for prompt in held_out_prompts()[:HELD_OUT]]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _figures(run: Path, number: int) -> dict[str, float]:
    """What the model that a round starts from does on the held-out openings."""
    answers = run / f"round-{number}" / "answers"
    measured = json.loads((answers / "figures.json").read_text())["held_out"]
    records = list(read_generations(answers / "held_out"))
    valid = [record["finished"] and is_grammatical(record["prompt"], record["text"]) for record in records]
    return {
        "valid": statistics.fmean(valid),
        "sentences": statistics.fmean(grammatical_share(record["prompt"], record["text"]) for record in records),
        "logp": measured["real_logp_per_token"],
        "tokens": measured["tokens"],
    }


def _verdicts(found: dict[str, dict[str, Sequence[float]]]) -> None:
    mean = {row: {name: statistics.fmean(values) for name, values in figures.items()} for row, figures in found.items()}
    valid = [mean[row]["valid"] for row in ROWS[: ROUNDS + 1]]
    conclude("the share of grammatical answers rises in each round", valid == sorted(set(valid)))
    for row in ROWS[ROUNDS + 1 :]:
        conclude(f"after three rounds more is grammatical than after {row}", valid[-1] > mean[row]["valid"])
    conclude("the likelihood of held-out reviews does not fall", mean["round 3"]["logp"] >= mean["start"]["logp"])


if __name__ == "__main__":
    main()
