"""Segments against single turns and whole conversations, where it is known which turns decide (arXiv 2501.01821).

    python examples/claims/segments.py [--seeds 3]
    python examples/claims/segments.py --write FOLDER      # base model and pairs, for a recipe

An agent of the small social world is cloned from an expert that is often wrong, and meets its partners. Each failure is
paired with a sale that goes on from before the first wrong turn. The same pairs then train the same model for as many
steps by the single turn, by a fixed number of turns, by the turns that decided, by all turns to the end, and by DMPO;
and with unequal segments, which the paper saw collapse. Measured on new partners: sales, the KL to the base model in
small talk and in the deciding turns, and turns that are still of the agent's language. About five minutes a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import conclude, show, told
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.data import DataSpec
from prefopt.data.segments import as_json_lines, build_segments, selector_of
from prefopt.losses import Loss, make
from prefopt.scratch import build_model, train_tokenizer
from prefopt.world.social import expert_sessions, session_pairs
from prefopt.world.social_figures import measure, session_row

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
PLAIN = {
    "lr_scheduler_type": "linear",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_strategy": "no",
    "activation_checkpointing": False,
    "seed": 0,
}
RATE = 5e-5  # at 3e-4 every way loses sales: what the wrong acts lose goes to words that are no acts at all


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    sessions: int = 4000
    epochs: int = 6
    pairs: int = 800
    steps: int = 80
    partners: int = 400


QUICK = Size(sessions=1000, epochs=3, pairs=16, steps=2, partners=40)


@dataclass(frozen=True)
class Way:
    """A way to train: the loss, the selector that cuts the pairs, and the segments that replace those it gives."""

    loss: Loss
    select: str
    segments: Mapping[str, list[int]] | None = None


SEGMENT = make("segment_dpo", beta=0.1)
WAYS = {
    "single turn": Way(SEGMENT, "single_turn"),
    "fixed, 2 turns": Way(SEGMENT, "fixed:2"),
    "fixed, 3 turns": Way(SEGMENT, "fixed:3"),
    "oracle segment": Way(SEGMENT, "given"),
    "to the end (ETO)": Way(make("eto", beta=0.1), "to_end"),
    "to the end, DMPO occupancy": Way(make("dmpo", beta=0.1), "to_end"),
    "to the end, DMPO phi": Way(make("dmpo", beta=0.1, turn_weight="phi"), "to_end"),
    "unequal, 3 turns against 1": Way(SEGMENT, "to_end", {"chosen": [0, 1, 2], "rejected": [0]}),
    "unequal, 1 turn against 3": Way(SEGMENT, "to_end", {"chosen": [0], "rejected": [0, 1, 2]}),
}
MEASURES = {
    "sales": "sales",
    "key_kl": "KL, deciding turns",
    "talk_kl": "KL, small talk",
    "language": "turns in the agent's language",
    "words": "words a turn",
}


def base_model(seed: int, size: Size, folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The agent cloned from the expert's conversations."""
    sessions = expert_sessions(size.sessions, seed)
    texts = [message["content"] for session in sessions[:200] for message in session.messages]
    tokenizer = train_tokenizer(texts, 512, chat=True)
    rows = [session_row(session) for session in sessions]
    settings = PreferenceConfig(
        folder, learning_rate=3e-3, per_device_train_batch_size=32, num_train_epochs=size.epochs, **PLAIN
    )
    trainer = PreferenceTrainer(
        build_model(SHAPE, tokenizer, seed), args=settings, loss="sft", train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    return trainer.model, tokenizer


def rows_of(way: Way, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, cut as a way says."""
    rows, _ = build_segments(DataSpec(rows=pairs), selector_of(way.select))
    return rows if way.segments is None else [{**row, "segments": dict(way.segments)} for row in rows]


def trained(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, way: Way, pairs: list[dict[str, Any]], size: Size,
    rate: float, folder: str,
) -> PreTrainedModel:  # fmt: skip
    """The base model after so many steps of one way."""
    settings = PreferenceConfig(
        folder, learning_rate=rate, per_device_train_batch_size=32, max_steps=size.steps, allow_unequal_segments=True,
        reference={"source": "live"}, **PLAIN,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        copy.deepcopy(base), args=settings, loss=way.loss, train_dataset=rows_of(way, pairs), processing_class=tokenizer
    )
    trainer.train()
    return trainer.model


def figures(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size, seed: int
) -> dict[str, float]:
    """The figures of a model on partners that are the same for every way; see `prefopt.world.social_figures`."""
    return asdict(measure(model, base, tokenizer, size.partners, seed + 7)[0])


def write(folder: Path, size: Size) -> None:
    """The base model, the pairs as whole conversations, and the segments that decided them, for `segment_dpo`."""
    with tempfile.TemporaryDirectory() as runs:
        base, tokenizer = base_model(0, size, runs)
    folder.mkdir(parents=True, exist_ok=True)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    pairs = session_pairs(base, tokenizer, size.pairs, seed=100)
    (folder / "sessions.jsonl").write_text(as_json_lines(pairs))
    (folder / "segments.jsonl").write_text(as_json_lines(rows_of(WAYS["oracle segment"], pairs)))
    print(f"{len(pairs)} pairs and the base model are in {folder}")


def compare(seeds: int, size: Size, rate: float) -> None:
    """Print the table over seeds, and what of the paper's claims was seen."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("base model", *WAYS)}
    out = Path("runs/segments/segments.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            base, tokenizer = base_model(seed, size, folder)
            pairs = session_pairs(base, tokenizer, size.pairs, seed=100 + seed)
            print(f"seed {seed}: {len(pairs)} pairs", flush=True)
            found["base model"].append(figures(base, base, tokenizer, size, seed))
            for name, way in WAYS.items():
                model = trained(base, tokenizer, way, pairs, size, rate, folder)
                found[name].append(figures(model, base, tokenizer, size, seed))
            out.write_text(json.dumps(found, indent=2))
    show(["", *MEASURES.values()],
         [[name, *(told([run[key] for run in runs]) for key in MEASURES)] for name, runs in found.items()])  # fmt: skip
    judge(found)


def judge(found: Mapping[str, list[dict[str, float]]]) -> None:
    """Say what was seen: a difference counts where it is more than twice its standard error over the seeds."""
    oracle, whole, single = "oracle segment", "to the end (ETO)", "single turn"
    unequal = [name for name in WAYS if name.startswith("unequal")]
    conclude("the segment that decided sells more often than single turns", above(found, "sales", oracle, single))
    conclude("whole conversations sell more often than single turns", above(found, "sales", whole, single))
    conclude("whole conversations move small talk further than the segment", above(found, "talk_kl", whole, oracle))
    conclude("unequal segments sell less often", all(above(found, "sales", oracle, name) for name in unequal))


def above(found: Mapping[str, list[dict[str, float]]], measure: str, one: str, other: str) -> bool:
    """Whether `one` has clearly more of a measure than `other`, seed by seed."""
    gaps = [first[measure] - second[measure] for first, second in zip(found[one], found[other], strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return fmean(gaps) > 2 * error


def main() -> None:
    """Compare, or write the files for a recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--quick", action="store_true", help="everything tiny: to see that it runs")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate (default {RATE:g})")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write base model and pairs, and stop")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    if options.write:
        write(options.write, size)
    else:
        compare(options.seeds, size, options.rate)


if __name__ == "__main__":
    main()
