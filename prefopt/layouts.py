"""Which row layout a run reads its rows in: by what it saves on these rows, and only where this model can take it.

Support is found out, not looked up: the same rows are scored in both layouts before anything is trained. A model that
carries a state from token to token would let one answer read another without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate.utils import gather_object, send_to_device
from torch import nn

from prefopt.console import say
from prefopt.data.collation import Collator, Row
from prefopt.data.dataset import TokenDataset
from prefopt.data.sampler import WindowSampler
from prefopt.errors import UserError
from prefopt.models import has_dropout
from prefopt.reference.live import FrozenModel, plan_of
from prefopt.scoring.model import causal_lm
from prefopt.scoring.selfcheck import check_layouts

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

AUTO, PLAIN, SHARED = "auto", "plain", "shared"

# The gain that is worth it: the estimate leaves the making of masks out.
_WORTH = 0.05
# An operation of attention takes this many times as long as one of a matrix product (measured on a CPU).
_SLOWER = 1.5
_MEASURED = 100  # micro-batches, of so many rows
_ROWS = 8


@dataclass(frozen=True)
class Reading:
    """What a layout makes of each token of the plain layout: the tokens that are read, and the work they come to.

    Work is counted in units of one position without its attention; padding is part of it.
    """

    tokens: float
    work: float


def choose_layout(trainer: PreferenceTrainer, *, own_collator: bool) -> None:
    """Settle `row_layout`, give the trainer's collator that layout, and say which it is and why.

    Every rank must call this, once the model is on its device. With `own_collator` the user's collator stays as it is.
    Raises `UserError` where `shared` is asked for and cannot be had.
    """
    if not own_collator:
        trainer.data_collator = replace(cast(Collator, trainer.data_collator), masks_padding=_unpads(trainer.model))
    asked = trainer.args.row_layout
    if asked == SHARED and own_collator:
        raise UserError("row_layout: your own data_collator lays the rows out itself. Write row_layout: auto")
    if asked == PLAIN or own_collator:
        return
    collator = cast(Collator, trainer.data_collator)
    if asked == AUTO:
        collator, why = _best(trainer, collator)
        trainer.data_collator = collator
        say(f"row layout: {why}")
        return
    trainer.data_collator = replace(collator, shared=True)
    if _draws_at_random(trainer):
        say("row layout: shared: the answers of a prompt see the same dropout or noise in it, unlike in plain rows")
    if not _is_sharded(trainer):
        check_layout(trainer, trainer.model)


def check_layout(trainer: PreferenceTrainer, model: nn.Module) -> None:
    """Raise `UserError` where answers share rows and this model scores them otherwise than it does in plain rows."""
    problem = _problem(trainer, model, plain_rows(trainer.data_collator)) if is_shared(trainer.data_collator) else ""
    if problem:
        raise UserError(f"row_layout: {problem}. Write row_layout: plain")


def is_shared(collator: Any) -> bool:
    """Whether answers share the rows of their prompts."""
    return isinstance(collator, Collator) and collator.shared


def plain_rows(collator: Any) -> Any:
    """The same collator with a row for each answer."""
    return replace(collator, shared=False) if is_shared(collator) else collator


def _best(trainer: PreferenceTrainer, plain: Collator) -> tuple[Collator, str]:
    """The layout that serves a run best, and why."""
    if trainer.train_dataset is None:
        return plain, "plain: nothing is trained"
    if _is_sharded(trainer):
        return plain, "plain: a sharded model cannot be tried beforehand; row_layout: shared has it tried at the start"
    if _draws_at_random(trainer):
        return plain, "plain: dropout or noise is on, and a shared prompt would draw it once for all its answers"
    shared = replace(plain, shared=True)
    before, after = measure(trainer, plain), measure(trainer, shared)
    saved = 1 - after.work / before.work
    if saved < _WORTH:
        return plain, f"plain: computing prompts once would save {max(0, saved):.0%} of the work, too little to pay"
    problem = _problem(trainer, trainer.model, plain)
    if problem:
        return plain, f"plain: {problem}"
    return shared, (
        f"shared: prompts are computed once, which saves {1 - after.tokens / before.tokens:.0%} of the tokens, and "
        f"{saved:.0%} of the backbone's work with padding and attention"
    )


def _unpads(model: nn.Module) -> bool:
    """Whether the attention kernel skips what a mask calls padding; for the others no mask is the faster kernel."""
    return "flash" in str(causal_lm(model).config._attn_implementation)


def _is_sharded(trainer: PreferenceTrainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _draws_at_random(trainer: PreferenceTrainer) -> bool:
    return has_dropout(trainer.model) or trainer.args.neftune_noise_alpha is not None


def measure(trainer: PreferenceTrainer, collator: Collator) -> Reading:
    """What a collator makes of micro-batches of an epoch, a sample spread over all of it.

    They are of one size however the run is split, so that a run resumed on other devices settles on its own layout.
    """
    data = trainer.train_dataset
    batches = list(_sampler(trainer, data, collator, batch_size=_ROWS, strategy=trainer.args.train_sampling_strategy))
    # The width at which attention over a row takes as long as everything else in a layer.
    even = 6 * causal_lm(trainer.model).config.hidden_size / _SLOWER
    plain, tokens, work = 0, 0, 0.0
    for index in np.linspace(0, len(batches) - 1, min(len(batches), _MEASURED)).astype(int):
        batch = collator([data[row] for row in batches[index]])
        plain += batch["tokens"]
        tokens += batch["reading"]["unique_tokens"][0]
        work += batch["input_ids"].numel() * (1 + batch["input_ids"].shape[1] / even)
    return Reading(tokens / plain, work / plain)


def row_sampler(
    trainer: PreferenceTrainer, dataset: TokenDataset, *, batch_size: int, is_training: bool
) -> WindowSampler:
    """The order of a data set's rows in the batches of this rank, for the layout that the trainer has settled on."""
    args = trainer.args
    return _sampler(
        trainer,
        dataset,
        trainer.data_collator,
        batch_size=batch_size,
        accumulation=args.gradient_accumulation_steps if is_training else 1,
        world_size=args.world_size,
        rank=args.process_index,
        strategy=args.train_sampling_strategy if is_training else "longest_first",
        drop_last=args.dataloader_drop_last and is_training,
    )


def _sampler(trainer: PreferenceTrainer, dataset: TokenDataset, collator: Any, **split: Any) -> WindowSampler:
    args, shared = trainer.args, is_shared(collator)
    return WindowSampler(
        dataset.widths(shared=shared, rejected=trainer.objective.all_completions),
        seed=args.seed if args.data_seed is None else args.data_seed,
        prompts=dataset.prompts if shared else None,
        **split,
    )


def _problem(trainer: PreferenceTrainer, model: nn.Module, plain: Collator) -> str:
    """Why this model, or a reference that is another one, cannot share prompts, on any rank; or nothing."""
    reference = trainer.reference
    models = [model, *([reference.model] if isinstance(reference, FrozenModel) and not reference.is_start else [])]
    return next((problem for problem in gather_object([_tried(trainer, models, plain)]) if problem), "")


def _tried(trainer: PreferenceTrainer, models: list[nn.Module], plain: Collator) -> str:
    rows = _telling_rows(trainer)
    batches = [replace(plain, shared=shared)(rows) for shared in (False, True)]
    for model in models:
        here = next(model.parameters()).device
        one, other = (send_to_device(plan_of(batch), here) for batch in batches)
        try:
            found = check_layouts(
                model, one, other, batches[0]["sequence"].to(here), trainer.accelerator.mixed_precision
            )
        except Exception as error:  # whatever a model that is not made for this does
            return f"{type(causal_lm(model)).__name__} cannot share prompts: {str(error).strip().splitlines()[0]}"
        if not found.max_difference <= found.bound:
            return (
                f"{type(causal_lm(model)).__name__} scores answers that share a prompt otherwise, by "
                f"{found.max_difference:.2g} nats a token (bound {found.bound:.1g})"
            )
    return ""


def _telling_rows(trainer: PreferenceTrainer) -> list[Row]:
    """The rows of the prompt that makes the longest row of all, where a window would show, and a short one, padded."""
    evaluation: Any = trainer.eval_dataset
    data = trainer.train_dataset or (next(iter(evaluation.values())) if isinstance(evaluation, Mapping) else evaluation)
    widths, prompts = np.array(data.widths(shared=True)), np.array(data.prompts)
    together = np.bincount(prompts, weights=widths)
    rows = np.flatnonzero(prompts == together.argmax())[: trainer.args.train_batch_size]
    return [data[int(row)] for row in dict.fromkeys([*rows.tolist(), int(widths.argmin())])]
