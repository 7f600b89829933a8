"""Batches on their way to the device: made ahead of their step, and copied without waiting for the one under way."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Sampler

from prefopt.config import PreferenceConfig
from prefopt.data.collation import Collator
from prefopt.data.dataset import TokenDataset
from prefopt.interrupt import spare_worker


def batch_loader(
    dataset: TokenDataset, sampler: Sampler[list[int]], collator: Collator | Any, args: PreferenceConfig
) -> DataLoader:
    """A plain loader, not prepared: accelerate would shard it again and repeat rows to even the batches.

    A worker stays a step ahead: all micro-batches of a step are asked for at once, before the first is run.
    """
    ahead = max(2, args.gradient_accumulation_steps) if args.dataloader_num_workers else None
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers or 0,
        worker_init_fn=spare_worker,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor or ahead,
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on the device, in the precision they have: scores of a reference are no model inputs.

    From pinned memory nothing waits; elsewhere than on CUDA such a copy may be read before it is there.
    """
    return send_to_device(batch, device, non_blocking=device.type == "cuda")
