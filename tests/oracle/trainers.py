"""Our trainer and TRL's on the same rows, with the same weights, for one step.

A policy and a reference that differ, so that margins are not 0 and a loss is not what it is on equal models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from prefopt.config import PreferenceConfig
from prefopt.losses import Objective, make
from prefopt.trainer import PreferenceTrainer
from tests import helpers

TOLERANCE = 1e-5
ONE_STEP = {
    "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip

Data = tuple[PreTrainedTokenizerBase, list[dict[str, Any]], int]
Terms = Sequence[tuple[float, str, Mapping[str, Any]]]  # weight, name and knobs of each loss


def noisy(model: torch.nn.Module, seed: int) -> Any:
    """The model, now far enough from uniform that a wrong token, mask or sign shows in the first digits."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter)
    return model


def policy(tokenizer: PreTrainedTokenizerBase) -> Any:
    return noisy(helpers.make_model(vocab_size=len(tokenizer)), 1)


def reference(tokenizer: PreTrainedTokenizerBase) -> Any:
    return noisy(helpers.make_model(vocab_size=len(tokenizer)), 2)


def ours(
    data: Data, folder: Path, terms: Terms = ((1.0, "dpo", {}),), train_dataset: Any = None, **settings: Any
) -> PreferenceTrainer:
    tokenizer, rows, limit = data
    objective = Objective([(weight, make(name, **knobs)) for weight, name, knobs in terms])
    args = PreferenceConfig(
        output_dir=str(folder / "ours"), max_length=limit, activation_checkpointing=False, **{**ONE_STEP, **settings}
    )
    return PreferenceTrainer(
        policy(tokenizer),
        None if objective.reference == "none" else reference(tokenizer),
        args,
        objective,
        train_dataset=Dataset.from_list(rows) if train_dataset is None else train_dataset,
        processing_class=tokenizer,
    )


def trl_dpo(data: Data, folder: Path, **settings: Any) -> DPOTrainer:
    tokenizer, rows, limit = data
    args = DPOConfig(
        output_dir=str(folder / "trl"), max_length=limit, gradient_checkpointing=False, **{**ONE_STEP, **settings}
    )
    return DPOTrainer(
        policy(tokenizer),
        reference(tokenizer),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def trl_cpo(data: Data, folder: Path, **settings: Any) -> CPOTrainer:
    """TRL's trainer for losses without a reference."""
    tokenizer, rows, limit = data
    args = CPOConfig(
        output_dir=str(folder / "trl"), max_length=limit, gradient_checkpointing=False, **{**ONE_STEP, **settings}
    )
    return CPOTrainer(policy(tokenizer), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def trl_kto(data: Data, folder: Path, **settings: Any) -> KTOTrainer:
    """TRL's trainer for single, labelled answers."""
    tokenizer, rows, limit = data
    args = KTOConfig(
        output_dir=str(folder / "trl"), max_length=limit, gradient_checkpointing=False, **{**ONE_STEP, **settings}
    )
    return KTOTrainer(
        policy(tokenizer),
        reference(tokenizer),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def whole_batch(trainer: Trainer) -> Any:
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def loss_and_gradients(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor."""
    assert found.keys() == expected.keys()
    return {name: (found[name] - expected[name]).abs().max().item() for name in expected}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    differences = worst(found, expected)
    assert not {name: difference for name, difference in differences.items() if not difference <= tolerance}
