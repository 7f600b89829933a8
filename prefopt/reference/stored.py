"""Numbers of an answer that stay in the store until a batch needs them: hidden states are too many for memory."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path
from sqlite3 import Connection

import numpy as np
import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.reference import database
from prefopt.reference.database import DamagedError


class StoredAnswer:
    """The place of one answer's numbers: a file of the store, its key and the answer's id. Small, and safe to hand to
    the processes that load data."""

    __slots__ = ("id", "key", "path")

    def __init__(self, path: Path, key: str, id: bytes) -> None:
        self.path, self.key, self.id = path, key, id

    def read(self) -> Tensor:
        """The numbers, `[n, D]`. Raises `UserError` when the store no longer has them, whole."""
        try:
            values = self._values()
            if values is None:  # the file may have been replaced since it was opened
                _connection.cache_clear()
                values = self._values()
            if values is None:
                raise DamagedError("an answer's row is gone or damaged")
        except DamagedError as error:
            raise UserError(
                f"{self.path}: {error}, and training needs it. Give the same command again: what is missing is "
                "computed anew, and training goes on from its last checkpoint"
            ) from error
        return as_tensor(values)

    def _values(self) -> np.ndarray | None:
        with database.errors_of(self.path):
            db = _connection(self.path, os.getpid(), threading.get_ident())
            found, _ = database.read_rows(db, self.key, [self.id])
        return found.get(self.id)


@lru_cache(maxsize=8)
def _connection(path: Path, process: int, thread: int) -> Connection:
    """A connection that is kept open, so that a file deleted meanwhile can still be read to its end.

    It must not cross a fork, nor be shared by threads.
    """
    return database.reader(path)


def as_array(numbers: Tensor) -> np.ndarray:
    """Numbers as the store takes them: bfloat16, which numpy lacks, as the unsigned integers of its bits."""
    numbers = numbers.detach().cpu()
    return numbers.view(torch.uint16).numpy() if numbers.dtype == torch.bfloat16 else numbers.numpy()


def as_tensor(values: np.ndarray) -> Tensor:
    """The inverse of `as_array`."""
    numbers = torch.from_numpy(values)
    return numbers.view(torch.bfloat16) if numbers.dtype == torch.uint16 else numbers
