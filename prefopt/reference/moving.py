"""A reference that follows the policy (TR-DPO): every so many steps it becomes an average of the two, or a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from prefopt.console import say
from prefopt.errors import UserError
from prefopt.reference.identity import configuration_of
from prefopt.reference.live import AdapterOff, FrozenModel, adapter_twins
from prefopt.reference.rule import AVERAGE_WIDTH, SyncRule
from prefopt.scoring.model import causal_lm

FILE = "_reference/moving.safetensors"
"""Where a checkpoint keeps the reference; a name that starts with `_` is not sent with the model."""


class MovingReference(TrainerCallback):
    """Moves a live reference after the policy while training runs, and is kept in checkpoints.

    Of weights in half precision the average is held in float32, and the reference is that average rounded: added to
    bfloat16 itself, a small share of a small difference would round to nothing, time and again. `policy` is the model
    below the wrappers. Raises `UserError` for a reference whose weights are not those of such a policy.
    """

    def __init__(self, policy: nn.Module, reference: FrozenModel | AdapterOff, rule: SyncRule) -> None:
        self.policy, self.reference, self.rule = policy, reference, rule
        # A copy's frozen weights are the policy's own for good.
        self._is_copy = reference.is_start
        if isinstance(reference, FrozenModel) and not reference.is_start:
            _refuse_unlike(reference.model, policy)
        self._averages: dict[str, Tensor] = {}
        self._has_moved = False
        reference.summary = f"{reference.summary}, {rule}"

    @property
    def bytes(self) -> int:
        """What a checkpoint holds of it."""
        return sum(
            theirs.numel() * (AVERAGE_WIDTH if self._is_averaged(theirs) else theirs.itemsize)
            for theirs, _ in self._twins().values()
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the memory of the averages now, not in the middle of a run, and tell one that is too short for it.

        Raises `UserError` for a run from step 0 when an earlier one has moved the reference: of the start nothing is
        kept.
        """
        if self._has_moved and state.global_step == 0:
            raise UserError(
                "reference: an earlier training has moved it, so this trainer cannot begin from the start again. Make "
                "a new trainer, which may also go on from a checkpoint"
            )
        for name, (theirs, _) in self._twins().items():
            self._average(name, theirs)
        if state.max_steps < self.rule.sync_steps:
            say(
                f"warning: the run has {state.max_steps} steps, and the reference would first move after "
                f"{self.rule.sync_steps}, so it stays. Write a smaller reference.sync_steps"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the policy after the optimizer step, before whatever is evaluated or saved at that step."""
        if state.global_step % self.rule.sync_steps == 0:
            self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Move the reference once."""
        self._has_moved = True
        for name, (theirs, ours) in self._twins().items():
            if self.rule.mixup_alpha == 1 or not theirs.is_floating_point():
                theirs.copy_(ours)
                continue
            average = self._average(name, theirs)
            average.lerp_(ours.to(average), self.rule.mixup_alpha)  # exact where the two are equal
            if average is not theirs:
                theirs.copy_(average)

    def save(self, folder: Path) -> None:
        """Write what it is now into a checkpoint. Call it from one process."""
        path = folder / FILE
        path.parent.mkdir(exist_ok=True)
        tensors = {name: self._averages.get(name, theirs) for name, (theirs, _) in self._twins().items()}
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Be what it was when a checkpoint was made. Raises `UserError` for a checkpoint of another reference."""
        saved, twins = _read(folder), self._twins()
        self._has_moved = True
        shapes = {name: theirs.shape for name, (theirs, _) in twins.items()}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise UserError(f"{folder / FILE}: not the weights of this run's reference. Choose another output_dir")
        for name, (theirs, _) in twins.items():
            theirs.copy_(saved[name])
            if self._is_averaged(theirs):
                self._average(name, theirs).copy_(saved[name])

    def _average(self, name: str, theirs: Tensor) -> Tensor:
        if not self._is_averaged(theirs):
            return theirs
        if name not in self._averages:
            self._averages[name] = theirs.detach().float()
        return self._averages[name]

    def _is_averaged(self, theirs: Tensor) -> bool:
        return theirs.is_floating_point() and self.rule.holds_average(theirs.itemsize)

    def _twins(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What moves, by name: of the reference, and of the policy. Tied weights have one name."""
        if isinstance(self.reference, AdapterOff):
            assert isinstance(self.policy, PeftModel) and self.reference.adapter is not None
            return adapter_twins(self.policy, self.reference.adapter)
        theirs, ours = _tensors(self.reference.model), _tensors(self.policy)
        fixed = {name for name, own in self.policy.named_parameters() if self._is_copy and not own.requires_grad}
        return {name: (value, ours[name]) for name, value in theirs.items() if name not in fixed}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and those buffers that a checkpoint holds."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: value for name, value in model.named_buffers() if name in saved}


def _refuse_unlike(reference: nn.Module, policy: nn.Module) -> None:
    """Refuse a model that shares no weights with the policy, or means another function by the same ones."""
    if isinstance(policy, PeftModel):
        raise UserError(
            "reference: with sync_steps the reference of an adapter is a copy of the adapter, which a model that is "
            "named does not have. Leave reference.model (or ref_model) out, or remove sync_steps"
        )
    theirs, ours = ({name: value.shape for name, value in _tensors(each).items()} for each in (reference, policy))
    unlike = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if not unlike:
        theirs, ours = (configuration_of(causal_lm(each)) for each in (reference, policy))
        unlike = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise UserError(
            "reference: with sync_steps it becomes an average of itself and the policy, and the model that is named is "
            f"of another architecture ({unlike[0]}{more}). Name one of the same, or remove sync_steps"
        )


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: does not hold the reference as it was ({FILE}): the checkpoint is of a run whose reference did "
            "not move, and this one's cannot go on from it. Remove sync_steps, or choose another output_dir"
        ) from error
