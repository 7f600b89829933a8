"""What is verified in the first seconds of a run, so that a wrong number costs seconds and not a night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from prefopt.console import say
from prefopt.data.dataset import TokenDataset
from prefopt.errors import DataError, NonFiniteError, UserError
from prefopt.layouts import check_layout, plain_rows
from prefopt.losses import Objective
from prefopt.scoring.modes import evaluating
from prefopt.scoring.rounding import BEYOND, rounding_bound
from prefopt.scoring.selfcheck import check_scores

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

_ROWS = 4
IDLE = (
    "warning: the run has one step, and with warmup_steps its learning rate is 0, so nothing is learnt. Write "
    "warmup_steps: 0, or a smaller per_device_train_batch_size or gradient_accumulation_steps"
)


def check_start(trainer: PreferenceTrainer, model: nn.Module) -> None:
    """Compare our scores with the model's own logits, and the policy with its reference, on a few short rows.

    Raises `UserError` when the scores are wrong for this model, or when a reference that should equal the starting
    policy does not.
    """
    say(*_notes(trainer), f"reference: {trainer.reference.summary}")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        check_layout(trainer, model)  # of others it is known already
    if trainer.args.self_check:
        result = check_scores(model, _small_batch(trainer, as_model=True))
        say(
            f"self-check: scores agree with the model's own logits to {result.max_difference:.1e} "
            f"(bound {result.bound:.1e})"
        )
    if trainer.reference.is_start:
        _check_margins(trainer, model, _small_batch(trainer))
    trainer.reference.is_start = False  # from here on the policy moves, and may be trained further


def _notes(trainer: PreferenceTrainer) -> list[str]:
    """What the losses have to say about their settings and the rows of the run."""
    data = trainer.train_dataset
    good = len(data) if data.paired else sum(bool(row["desirable"]) for row in data.rows)
    bad = len(data) if data.paired else len(data) - good
    losses = trainer.objective.losses
    rates = trainer.lr_scheduler.get_last_lr() if trainer.lr_scheduler is not None else [1.0]
    idle = [IDLE] if trainer.state.max_steps == 1 and not any(rates) else []
    counted = (f"{loss.name}: {note}" for loss in losses for note in loss.class_notes(good, bad))
    return [*(note for loss in losses for note in loss.notes()), *counted, *idle]


def check_rows(objective: Objective, data: Any, like: TokenDataset | None = None) -> Any:
    """The rows that the losses read of a data set (or a dict of them, or None), after refusing what they cannot use.

    Raises `DataError` for the wrong kind of rows, a missing column, a row the loss itself objects to, or rows unlike
    those of `like`, which the batches are laid out for.
    """
    if isinstance(data, TokenDataset):
        if like is not None and (data.paired, set(data.columns)) != (like.paired, set(like.columns)):
            raise DataError(
                f"evaluation rows are {_kind(data)}, training rows {_kind(like)}: give both the same columns, or the "
                "two losses would not mean the same"
            )
        objective.check_rows(paired=data.paired, columns=data.columns)
        for row in data.rows:
            problem = objective.row_problem(row["columns"])
            if problem:
                raise DataError(f"row {row['row']}: {problem}")
        return _without_unread(objective, data)
    return None if data is None else {name: check_rows(objective, part, like) for name, part in data.items()}


def _without_unread(objective: Objective, data: TokenDataset) -> TokenDataset:
    """Without the undesirable answers if no loss reads them: they would make steps that only momentum moves."""
    if objective.all_completions or data.paired:
        return data
    rows = [row for row in data.rows if row["desirable"]]
    if not rows:
        raise DataError("the loss reads desirable answers alone, and no row has one (`label` true)")
    if len(rows) == len(data):
        return data
    say(f"{len(data) - len(rows)} of {len(data)} rows are left out: no loss here reads undesirable answers")
    return replace(data, rows=rows)


def _kind(data: TokenDataset) -> str:
    columns = f" with {', '.join(data.columns)}" if data.columns else ""
    return f"{'pairs' if data.paired else 'single answers'}{columns}"


def check_step(
    accelerator: Accelerator, step: int, norm: Any, window: Sequence[tuple[Tensor, Tensor]], asked: bool = False
) -> bool:
    """Raise `NonFiniteError` before the optimizer moves when the step's loss or gradient is not finite.

    `norm` is that of the gradient, None where it is unknown; `window` holds (rows, loss) of this rank's micro-batches.
    `asked`: this rank was asked to stop; the answer is whether any was. Every rank must call this. It waits for the
    device once.
    """
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards it
    bad = (~torch.isfinite(torch.stack([loss for _, loss in window]))).any()
    # A loss scaler meets infinite gradients now and then and skips those steps itself.
    if norm is not None and accelerator.scaler is None:
        bad = bad | ~torch.isfinite(torch.as_tensor(norm, device=bad.device))
    flags = torch.stack([bad.float(), torch.full_like(bad, asked, dtype=torch.float32)])
    is_bad, is_asked = accelerator.reduce(flags, reduction="sum").tolist()
    if is_bad:
        raise _not_finite(step, norm, window)
    return bool(is_asked)


def _not_finite(step: int, norm: Any, window: Sequence[tuple[Tensor, Tensor]]) -> NonFiniteError:
    """The error for a step, with the rows it came from, gathered from all ranks."""
    parts = gather_object([(rows.tolist(), bool(torch.isfinite(loss))) for rows, loss in window])
    bad = [rows for rows, finite in parts if not finite]
    rows = sorted(row for part in bad or [rows for rows, _ in parts] for row in part)
    what = "loss" if bad else f"gradient (norm {float(norm) if norm is not None else 'unknown'})"
    return NonFiniteError(
        f"step {step}: the {what} is not finite. The optimizer has not moved, and nothing was saved after it. Rows of "
        f"the step (position in the training data): {rows}. Look at these rows; a lower learning_rate, a lower "
        "max_grad_norm or float32 may help."
    )


def _small_batch(trainer: PreferenceTrainer, as_model: bool = False) -> dict[str, Any]:
    """A few short rows on the device: in the layout of training, or in the one the model itself reads."""
    dataset, collate = trainer.train_dataset, trainer.data_collator
    collate = plain_rows(collate) if as_model else collate
    shortest = sorted(range(len(dataset)), key=lambda index: dataset.lengths[index])[:_ROWS]
    return trainer._prepare_inputs(collate([dict(dataset[index]) for index in shortest]))


def _check_margins(trainer: PreferenceTrainer, model: nn.Module, batch: dict[str, Any]) -> None:
    with evaluating(model):
        scores = trainer.score(model, batch)
    longest = int(scores.lengths.max())
    bound = rounding_bound(model, trainer.accelerator.mixed_precision, longest)
    found = scores.log_ratio().abs().max().item()
    say(f"start-up margins: largest |log-ratio| {found:.1e} nats (rounding bound {bound:.1e})")
    if not found <= BEYOND * bound:
        raise UserError(
            f"policy and reference differ by {found:.3g} nats before training, ten times what rounding explains "
            f"({bound:.1e}): the reference is not the starting policy. If that is meant, name it with "
            "`reference.model` (or `ref_model`); otherwise look for dropout, hooks or weights changed by hand."
        )
