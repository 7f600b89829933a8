"""How a step is split into micro-batches that a device has room for: settled once, before training.

A step keeps its rows, and any split of the same rows gives the same step. So the budget decides about memory and speed,
and about nothing else.
"""

from __future__ import annotations

from prefopt.config import PreferenceConfig
from prefopt.console import say
from prefopt.data.answers import sides_in
from prefopt.data.dataset import TokenDataset
from prefopt.errors import UserError


def split_step(args: PreferenceConfig, data: TokenDataset | None, *, rejected: bool) -> None:
    """Set batch size and accumulation, their product unchanged, to the largest micro-batch within the token budget.

    Tokens are those of plain rows: each answer that is read (`rejected` False: all but those) with its prompt, padded
    to the longest of all. Does nothing without `max_tokens_per_device` or without rows. Raises `UserError` when not
    even one row fits.
    """
    budget = args.max_tokens_per_device
    if budget is None or data is None:
        return
    answers = sum(rejected or side != "rejected" for side in sides_in(data.rows[0]))
    row = answers * max(data.widths(shared=False, rejected=rejected))
    if row > budget:
        raise UserError(
            f"max_tokens_per_device: the longest row has {row:,} tokens, its prompt counted with each of its {answers} "
            f"answers, and the budget is {budget:,}. Raise it, or lower max_length"
        )
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch = next(size for size in range(min(step, budget // row), 0, -1) if step % size == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, step // batch
    say(
        f"token budget: {step} rows a step and device in {step // batch} micro-batches of {batch}, "
        f"at most {batch * row:,} tokens each"
    )
