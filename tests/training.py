"""Whole training runs on tiny models, small enough to repeat in every split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.config import PreferenceConfig
from prefopt.losses import Loss, LossOutput, Needs, Objective, Pairs
from prefopt.trainer import PreferenceTrainer
from tests import helpers


@dataclass(frozen=True)
class CentredLoss(Loss):
    """Squared distance of each margin to the mean margin of the step (Source: made for this test)."""

    name = "centred"
    needs = Needs(view="pairs", reference="logp")

    def estimates(self, view: Pairs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        margins = view.chosen.log_ratio() - view.rejected.log_ratio()
        return {"mean": (margins.sum(), torch.tensor(float(len(margins))))}

    def __call__(self, view: Pairs) -> LossOutput:
        margins = view.chosen.log_ratio() - view.rejected.log_ratio()
        return LossOutput((margins - view.estimates["mean"] - 1.0).square() / 100, "pair")


def make_trainer(
    output_dir: str | Path,
    rows: list[dict[str, Any]],
    *,
    model: nn.Module | None = None,
    reference: nn.Module | bool | None = None,
    reference_block: dict[str, Any] | None = None,
    loss: Any = "dpo",
    eval_rows: list[dict[str, Any]] | None = None,
    peft_config: Any = None,
    callbacks: Any = None,
    **settings: Any,
) -> PreferenceTrainer:
    """A trainer whose weights move by exactly the gradient: plain SGD, learning rate 1, no clipping, no schedule.

    `reference` False: the starting policy. `reference_block`: the settings called `reference`.
    """
    defaults = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    tokenizer = helpers.make_tokenizer()
    if reference is None and peft_config is None and Objective.of(loss).reference != "none":
        reference = helpers.make_model(seed=7, vocab_size=len(tokenizer))  # so that no margin is 0
    return PreferenceTrainer(
        model or helpers.make_model(vocab_size=len(tokenizer)),
        reference or None,
        PreferenceConfig(output_dir=str(output_dir), reference=reference_block, **{**defaults, **settings}),
        loss,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def weights(model: nn.Module) -> torch.Tensor:
    """All trainable parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def trained(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The weights after a whole run."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return weights(trainer.model)
