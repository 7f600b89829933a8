"""A LoRA adapter: trained, and pushed to the Hub with a card that holds its recipe, results and curves.

    python examples/lora_and_push.py                       # no network: lists what would be sent, and sends nothing
    hf auth login
    python examples/lora_and_push.py YOUR_NAME/my-adapter  # sends it

With a model of your own, give its name on the Hub as `model`, so that readers find it too. While it trains, a run with
`push_to_hub` also sends every checkpoint in the background; whatever the Hub does, the training goes on, and
`prefopt push runs/adapter` later sends what did not arrive.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft import LoraConfig

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.hub.command import push_folder
from prefopt.scratch import build_model, train_tokenizer

BASE, FOLDER = "runs/tiny_base", "runs/adapter"
COLOURS = ["red", "blue", "green", "brown", "white"]


def main(repo: str | None) -> None:
    """Train on 40 pairs; then push to `repo`, or show what a push would send."""
    rows = [
        {"prompt": f"Paint {n} walls {colour}.", "chosen": f" {n} {colour} walls, done.", "rejected": " No."}
        for n in range(2, 10)
        for colour in COLOURS
    ]
    tokenizer = train_tokenizer((text for row in rows for text in row.values()), vocab_size=400)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for part in (tokenizer, build_model({"model_type": "llama", **shape}, tokenizer, seed=0)):
        part.save_pretrained(BASE)

    settings = {"learning_rate": 1e-2, "num_train_epochs": 3, "logging_steps": 5}
    trainer = PreferenceTrainer(
        BASE,
        args=PreferenceConfig(FOLDER, **settings, push_to_hub=bool(repo), hub_model_id=repo),
        loss="dpo",
        train_dataset=rows,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    if repo:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()
        push_folder(Path(FOLDER), dry_run=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
