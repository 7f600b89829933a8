"""Small SPIN runs: a tiny model, rows of random words, and recipes over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prefopt.models import load_model
from prefopt.procedures import make_plan, run_plan
from prefopt.recipe import Recipe, load_recipe
from tests.helpers import make_model, make_tokenizer, text_pairs

RECIPE = """\
model_name_or_path: {folder}/tiny
data_files: {{train: {folder}/answers.jsonl, test: {folder}/held_out.jsonl}}
loss: {{name: dpo}}
procedure:
  name: spin
  rounds: 2
  beta: [0.5, 2.0]
  learning_rate: [1.0e-2, 5.0e-3]
  num_train_epochs: 2
  max_new_tokens: 8
  shard_size: 5
output_dir: {folder}/run
per_device_train_batch_size: 4
lr_scheduler_type: constant
save_strategy: steps
save_steps: 2
logging_steps: 1
report_to: none
disable_tqdm: true
self_check: false
use_cpu: true
"""


def prepare(folder: Path, *, chat: bool = False) -> Path:
    """A folder with a tiny model, twelve answers, four held-out ones and a recipe; the recipe's file."""
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    for name, count, seed in (("answers", 12, 0), ("held_out", 4, 1)):
        rows = [_row(row, chat) for row in text_pairs(count, seed=seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(folder=folder))
    return file


def ends_often(model_folder: Path) -> None:
    """Make the end marker of a model likely, so that answers end before the limit."""
    model = load_model(str(model_folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[2, 0] = 0.7
    model.save_pretrained(model_folder)


def _row(row: dict[str, Any], chat: bool) -> dict[str, Any]:
    if not chat:
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    turns = ("user", row["prompt"]), ("assistant", row["chosen"].strip())
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def spin(file: Path, *options: str) -> Recipe:
    """Run a recipe with options over it; the recipe."""
    recipe = load_recipe(file, options)
    run_plan(make_plan(recipe))
    return recipe


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]
