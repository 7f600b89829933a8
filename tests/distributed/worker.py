"""Runs the cases of `test_ranks.py` on the ranks of one launch and writes what each rank found."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from prefopt.data import drafting, tokenization
from prefopt.data.drafts import Drafter
from prefopt.errors import NonFiniteError, Stopped, UserError
from tests.helpers import text_pairs
from tests.training import CentredLoss, make_trainer, weights

ADAPTER = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}

# name -> rows, settings; two ranks take half the batch of one, so that the steps are the same.
CASES: dict[str, dict[str, Any]] = {
    "thirteen_rows": {"rows": 13, "batch": 4, "accumulation": 2, "epochs": 2},
    "plain_rows": {"rows": 13, "batch": 4, "accumulation": 2, "epochs": 2, "layout": "plain"},
    "an_empty_rank_at_the_end": {"rows": 9, "batch": 8, "accumulation": 1, "epochs": 2},
    "adapter_and_checkpointing": {"rows": 13, "batch": 4, "accumulation": 2, "epochs": 2, "adapter": True},
    "sft": {"rows": 13, "batch": 4, "accumulation": 1, "loss": "sft", "rate": 0.3},
    "whole_distributions": {"rows": 9, "batch": 8, "accumulation": 1, "epochs": 2, "loss": "tdpo2", "eval_rows": 3},
    "whole_distributions_and_adapter": {"rows": 13, "batch": 4, "accumulation": 2, "loss": "tdpo1", "adapter": True},
    "moving_reference": {"rows": 13, "batch": 4, "accumulation": 1, "epochs": 2, "rate": 0.3, "sync_steps": 3},
    "moving_reference_of_an_adapter": {
        "rows": 13,
        "batch": 4,
        "accumulation": 1,
        "epochs": 2,
        "adapter": True,
        "sync_steps": 2,
    },
    "step_estimate": {"rows": 9, "batch": 8, "accumulation": 1, "loss": CentredLoss()},
    "targets": {
        "rows": 9,
        "batch": 8,
        "accumulation": 1,
        "loss": "slic",
        "rate": 0.1,
        "columns": {"target": " a bird"},
    },
    "evaluation": {"rows": 4, "batch": 4, "accumulation": 1, "eval_rows": 7},
    "evaluation_before_training": {"rows": 9, "batch": 4, "accumulation": 1, "eval_rows": 3, "evaluate_first": True},
    "evaluation_of_one_row": {"rows": 4, "batch": 4, "accumulation": 1, "eval_rows": 1},
}


class Visits(TrainerCallback):
    """Remembers which rows this rank was given, epoch by epoch."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append([])

    def watch(self, trainer: Any) -> None:
        stock = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *more: Any, **kwargs: Any) -> Any:
            self.rows[-1] += inputs["row"].tolist()
            return stock(model, inputs, *more, **kwargs)

        trainer.compute_loss = compute_loss


def run(case: dict[str, Any], folder: str, world: int) -> dict[str, Any]:
    """Train a case on this rank; its weights, the rows it saw, and what was logged."""
    visits = Visits()
    adapter = case.get("adapter", False)
    trainer = make_trainer(
        folder,
        text_pairs(case["rows"], **({"target": case["target"]} if "target" in case else {})),
        loss=case.get("loss", "dpo"),
        eval_rows=text_pairs(case["eval_rows"], seed=5) if "eval_rows" in case else None,
        peft_config=LoraConfig(**ADAPTER) if adapter else None,
        reference_block={"sync_steps": case["sync_steps"], "mixup_alpha": 0.6} if "sync_steps" in case else None,
        callbacks=[visits],
        per_device_train_batch_size=case["batch"] // world,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=case["accumulation"],
        num_train_epochs=case.get("epochs", 1),
        learning_rate=case.get("rate", 1.0),
        activation_checkpointing=adapter,
        row_layout=case.get("layout", "shared"),
    )
    visits.watch(trainer)
    if case.get("evaluate_first"):
        trainer.evaluate()
    trainer.train()
    evaluation = trainer.evaluate() if "eval_rows" in case else {}
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {"weights": weights(trainer.model), "visits": visits.rows, "logs": logs, "evaluation": evaluation}


def resume(folder: str, world: int) -> dict[str, torch.Tensor]:
    """Weights of a whole run of three epochs, and of one that goes on from a checkpoint in the middle of the second.

    13 rows, 4 a step: steps 1 to 4 are epoch one, and step 6 lies inside epoch two.
    """
    settings = {
        "per_device_train_batch_size": 4 // world,
        "num_train_epochs": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 6,
        "logging_steps": 4,  # so that tokens are counted between two lines of the log
        "row_layout": "shared",
    }
    whole = make_trainer(folder, text_pairs(13), **settings)
    whole.train()
    again = make_trainer(folder, text_pairs(13), **settings)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-6")
    tokens = [trainer.state.log_history[-2]["num_tokens"] for trainer in (whole, again)]
    return {"whole": weights(whole.model), "resumed": weights(again.model), "tokens": torch.tensor(tokens)}


def stop(folder: str, world: int) -> str:
    """The message of a step in which the micro-batch of one rank alone meets a bad number."""
    trainer = make_trainer(folder, text_pairs(8, weight=1.0), per_device_train_batch_size=4 // world)
    bad = max(range(8), key=lambda index: trainer.train_dataset.lengths[index])
    trainer.train_dataset.rows[bad]["columns"]["weight"] = math.nan
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error)
    return ""


RESUMED: dict[str, Any] = {
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 6,
    "logging_steps": 4,
}


class Signal(TrainerCallback):
    """Sends SIGTERM to one rank alone in the middle of a step, and waits until it has been heard."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.trainer.sigterm.asked:
                time.sleep(0.001)


def interrupted(folder: str, world: int) -> dict[str, Any]:
    """What a run ends with whose last rank alone is told to end in step 7, and that is then started again."""
    settings = {**RESUMED, "per_device_train_batch_size": 4 // world, "enable_jit_checkpoint": True}
    whole = make_trainer(f"{folder}/whole", text_pairs(13), **settings)
    whole.train()
    ours = Signal(world - 1, 6)
    ours.trainer = make_trainer(f"{folder}/cut", text_pairs(13), callbacks=[ours], **settings)
    try:
        ours.trainer.train()
    except Stopped as stop:
        status = stop.code
    again = make_trainer(f"{folder}/cut", text_pairs(13), **settings)
    again.train(resume_from_checkpoint="auto")
    return {
        "status": status,
        "stopped after": ours.trainer.state.global_step,
        "same": torch.equal(weights(whole.model), weights(again.model)) and logged(whole) == logged(again),
    }


def logged(trainer: Any) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [line for line in trainer.state.log_history if "loss" in line]


def refused(folder: str, world: int) -> str:
    """What every rank hears of a checkpoint that only the first one has read."""
    trainer = make_trainer(folder, text_pairs(13), **RESUMED, per_device_train_batch_size=4)
    try:
        trainer.train(resume_from_checkpoint="auto")
    except UserError as error:
        return str(error)
    return ""


def drafted(folder: str) -> int:
    """How many of 40 rows this rank tokenises, when what it makes is kept for the others."""
    counts, stock = [], Drafter.drafts
    small = patch.object(drafting, "CHUNK", 7), patch.object(tokenization, "CHUNK", 7)
    counting = patch.object(Drafter, "drafts", lambda self, rows: counts.append(len(rows)) or stock(self, rows))
    with small[0], small[1], counting:
        trainer = make_trainer(folder, text_pairs(40), token_cache=f"{folder}/tokens", dataset_num_proc=1)
    assert trainer.train_dataset.fingerprint == make_trainer(folder, text_pairs(40)).train_dataset.fingerprint
    return sum(counts)


def main(folder: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    found = {name: run(case, folder, world) for name, case in CASES.items()}
    found["resume"] = resume(f"{folder}/resume", world)
    found["stop"] = stop(f"{folder}/stop", world)
    found["interrupted"] = interrupted(f"{folder}/interrupted", world)
    found["refused"] = refused(f"{folder}/interrupted/whole", world)
    found["drafted"] = drafted(f"{folder}/drafted")
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
