"""DPOP against DPO on pairs whose answers are nearly the same (arXiv 2402.13228).

    python examples/claims/near_identical_pairs.py [--seeds 3]

A tiny model learns sums of three digits half-way; then 512 pairs tell the right sum from one with a single wrong digit.
The figures are those of 512 other sums: how far the right one rose or fell against the reference, in nats, and how many
fell. Takes about a minute a seed.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile

from common import conclude, seeds, show, told
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import Loss, make
from prefopt.scratch import build_model, train_tokenizer

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LOSSES = {
    "dpo": make("dpo", beta=0.3),
    "dpop, penalty 5": make("dpop", beta=0.3, penalty=5.0),
    "dpop, penalty 50": make("dpop", beta=0.3, penalty=50.0),
}
PLAIN = {
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_strategy": "no",
}


def sums(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Additions; the rejected answer has one wrong digit, the first or the second."""
    rows = []
    for _ in range(count):
        one, other = rng.randint(100, 999), rng.randint(100, 999)
        right = str(one + other)
        place = rng.randint(0, 1)
        wrong = rng.choice([digit for digit in "123456789" if digit != right[place]])
        prompt = f"{one}+{other}="
        rows.append({"prompt": prompt, "chosen": right, "rejected": right[:place] + wrong + right[place + 1 :]})
    return rows


def base(seed: int, tokenizer: PreTrainedTokenizerBase, folder: str) -> PreTrainedModel:
    """A model that was taught some sums, and is right about half of the digits of new ones."""
    model = build_model(SHAPE, tokenizer, seed)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in sums(random.Random(seed), 6400)
    ]
    settings = PreferenceConfig(folder, learning_rate=3e-3, per_device_train_batch_size=64, num_train_epochs=3, **PLAIN)
    PreferenceTrainer(model, args=settings, loss="sft", train_dataset=rows, processing_class=tokenizer).train()
    return model


def drift(
    model: PreTrainedModel, loss: Loss, seed: int, tokenizer: PreTrainedTokenizerBase, folder: str
) -> dict[str, float]:
    """Log-ratios of held-out right answers after 150 steps of a loss."""
    rng = random.Random(1000 + seed)
    settings = PreferenceConfig(folder, learning_rate=1e-3, per_device_train_batch_size=32, max_steps=150, seed=seed,
                                reference={"source": "live"}, **PLAIN)  # fmt: skip
    trainer = PreferenceTrainer(
        copy.deepcopy(model),
        args=settings,
        loss=loss,
        train_dataset=sums(rng, 512),
        eval_dataset=sums(rng, 512),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"fell": (found.predictions[:, 0] < 0).mean()},
    )
    trainer.train()
    figures = trainer.evaluate()
    return {name: figures[f"eval_{name}"] for name in ("logratios/chosen", "logratios/margin", "fell")}


def main() -> None:
    """Print the table, and whether DPO lowered the right answers and DPOP did not."""
    tokenizer = train_tokenizer(["0123456789+="], vocab_size=259)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds(__doc__, default=3):
            model = base(seed, tokenizer, folder)
            for name, loss in LOSSES.items():
                found[name].append(drift(model, loss, seed, tokenizer, folder))
    head = {"logratios/chosen": "right answers, nats", "fell": "share that fell", "logratios/margin": "margin, nats"}
    show(
        ["", *head.values()],
        [[name, *(told([run[key] for run in runs], 2) for key in head)] for name, runs in found.items()],
    )
    chosen = {name: statistics.mean(run["logratios/chosen"] for run in runs) for name, runs in found.items()}
    conclude("DPO lowers the right answers of nearly equal pairs", chosen["dpo"] < 0)
    conclude("DPOP does not", all(value >= 0 for name, value in chosen.items() if name != "dpo"))


if __name__ == "__main__":
    main()
