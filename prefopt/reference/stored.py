"""Numbers of an answer that stay in the store until a batch needs them: hidden states are too many for memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.reference.store import Entry, Store


class StoredAnswer:
    """The place of one answer's numbers; small, and safe to hand to the processes that load data."""

    __slots__ = ("folder", "id", "key", "kind")

    def __init__(self, folder: Path, kind: str, key: str, id: bytes) -> None:
        self.folder, self.kind, self.key, self.id = folder, kind, key, id

    def read(self) -> Tensor:
        """The numbers, `[n, D]`. Raises `UserError` when the store no longer has them, whole."""
        entry = Entry(Store(self.folder), self.key, {}, self.kind)
        found = entry.read([self.id])
        if self.id not in found:
            raise UserError(
                f"{entry.path}: an answer's numbers are gone or damaged, and training needs them. Give the same "
                "command again: they are computed anew, and training goes on from its last checkpoint"
            )
        return as_tensor(found[self.id])


def as_array(numbers: Tensor) -> np.ndarray:
    """Numbers as the store takes them: bfloat16, which numpy lacks, as the unsigned integers of its bits."""
    numbers = numbers.detach().cpu()
    return numbers.view(torch.uint16).numpy() if numbers.dtype == torch.bfloat16 else numbers.numpy()


def as_tensor(values: np.ndarray) -> Tensor:
    """The inverse of `as_array`."""
    numbers = torch.from_numpy(values)
    return numbers.view(torch.bfloat16) if numbers.dtype == torch.uint16 else numbers
