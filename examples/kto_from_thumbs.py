"""From a log of thumbs to a KTO run: read the votes, keep what is clear, train, look at the rewards of both classes.

    python examples/kto_from_thumbs.py

The log is what an assistant writes: one line an answer, with a thumb up, down or none. It takes seconds on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import make
from prefopt.scratch import build_model, train_tokenizer

LOG = Path("thumbs.jsonl")


def write_log() -> None:
    """Stands in for a log of your own."""
    judged = [("A city of bridges.", "up"), ("No idea.", "down"), ("A port on a river.", "up"), ("Hm.", None)]
    cities = ["Rome", "Oslo", "Lima", "Kyiv", "Bonn"]
    lines = [
        {"question": f"What is {city}?", "reply": reply, "thumb": thumb} for city in cities for reply, thumb in judged
    ]
    LOG.write_text("".join(json.dumps(line) + "\n" for line in lines))


def labelled(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    """Rows for KTO, without the answers that nobody judged."""
    for line in map(json.loads, lines):
        if line["thumb"] is not None:
            yield {"prompt": line["question"], "completion": " " + line["reply"], "label": line["thumb"] == "up"}


def main() -> None:
    """Train on the votes; good answers must rise and bad ones fall."""
    write_log()
    rows = list(labelled(LOG.read_text().splitlines()))
    tokenizer = train_tokenizer((f"{row['prompt']}{row['completion']}" for row in rows), vocab_size=400)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"learning_rate": 3e-3, "num_train_epochs": 6, "save_strategy": "no", "logging_steps": 4}
    trainer = PreferenceTrainer(
        build_model({"model_type": "llama", **shape}, tokenizer, seed=0),
        args=PreferenceConfig("runs/kto_from_thumbs", **settings),
        loss=make("kto", undesirable_weight=2.0),  # twice as many good answers as bad ones
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    figures = trainer.evaluate(rows)
    print(*(f"rewards/{side} {figures[f'eval_rewards/{side}']:+.3f}" for side in ("chosen", "rejected")), sep="\n")


if __name__ == "__main__":
    main()
