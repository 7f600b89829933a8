"""A trainer whose run outlives its process: sealed saves, and going on from the newest checkpoint that is whole."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from prefopt.config import PreferenceConfig
from prefopt.saving import checkpoint_to_resume, sealed_save


class DurableTrainer(Trainer):
    """The stock trainer with checkpoints that are whole or passed over. It knows nothing of preferences."""

    args: PreferenceConfig  # narrower than in the base class

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with sealed_save(self, {"world_size": self.args.world_size}):
            super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Train; `resume_from_checkpoint=True` goes on from the newest checkpoint that verifies, if there is one."""
        if resume_from_checkpoint is True:
            # Without its optimizer a checkpoint is a model, not a place to go on from.
            whole = not self.args.save_only_model
            resume_from_checkpoint = checkpoint_to_resume(str(self.args.output_dir)) if whole else None
        return super().train(resume_from_checkpoint, **kwargs)
