"""Small runs from a recipe, with the stand-in as the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from prefopt import cli
from tests.helpers import make_model, make_tokenizer, text_pairs
from tests.training import make_trainer

RECIPE = """\
model_name_or_path: tiny
data_files: pairs.jsonl
test_split_size: 2
loss: {name: dpo, beta: 0.2}
learning_rate: 1.0e-2
max_steps: 3
per_device_train_batch_size: 4
logging_steps: 1
eval_strategy: steps
eval_steps: 3
save_steps: 1
activation_checkpointing: false
disable_tqdm: true
output_dir: runs/first
"""
PUSH = ("--push_to_hub", "true", "--hub_model_id", "me/first")
LORA = ("--use_peft", "true", "--lora_target_modules", "[q_proj, v_proj]")

MODEL = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
REPORT = ["README.md", "metrics.jsonl", "recipe.yaml", "results.json"]
SO_FAR = ["README.md", "metrics.jsonl", "recipe.yaml"]
STATE = ["log_window_0.json", "manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


def make_folder(folder: Path) -> Path:
    """A folder as a user has it: a model, twelve pairs, a recipe."""
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12)))
    (folder / "my.yaml").write_text(RECIPE)
    return folder


def train(*options: str) -> Path:
    """Run the recipe in the current folder; its run folder."""
    assert cli.main(["train", "my.yaml", *options]) == 0
    named = options.index("--output_dir") + 1 if "--output_dir" in options else None
    return Path(options[named] if named else "runs/first")


def within(name: str, files: list[str]) -> list[str]:
    return [f"{name}/{file}" for file in files]


def train_in_python(folder: Path, **settings):
    """A trainer made in Python, after its training."""
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **settings}
    trainer = make_trainer(folder, text_pairs(8), **settings)
    trainer.train()
    return trainer
