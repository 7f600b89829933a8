"""DPO in plain Python: a tiny model made from nothing, 40 pairs in memory, and margins before and after.

    python examples/dpo_in_python.py

It takes seconds on a CPU and needs no network. With a model of your own, give its name or folder as `model` and leave
`processing_class` out: the tokenizer is then the model's.
"""

from __future__ import annotations

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.scratch import build_model, train_tokenizer

ANIMALS = ["cat", "dog", "owl", "fox", "bear", "crow", "goat", "seal"]
PLACES = ["garden", "forest", "harbor", "kitchen", "valley"]


def pairs(animals: list[str]) -> list[dict[str, str]]:
    """One row for each animal and place; the chosen answer is always the kind one."""
    return [
        {
            "prompt": f"What is the {animal} in the {place} like?",
            "chosen": f" The {animal} is kind and calm.",
            "rejected": f" The {animal} is rude and loud.",
        }
        for animal in animals
        for place in PLACES
    ]


def main() -> None:
    """Train on the pairs of eight animals, evaluate on two that were never seen."""
    train, held_out = pairs(ANIMALS), pairs(["wolf", "hen"])
    tokenizer = train_tokenizer((text for row in train for text in row.values()), vocab_size=400)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model({"model_type": "llama", **shape}, tokenizer, seed=0)

    trainer = PreferenceTrainer(
        model,
        args=PreferenceConfig(
            output_dir="runs/dpo_in_python", learning_rate=3e-3, num_train_epochs=4, save_strategy="no", logging_steps=5
        ),
        loss="dpo",  # or make("dpo", beta=0.2), a list of losses, or a loss of your own
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_rewards/margins", "eval_rewards/accuracies", "eval_loss"):
        print(f"{name:24} {before[name]:8.4f} -> {after[name]:8.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
