"""Which rows make a step, and how a step's rows are dealt over micro-batches and ranks.

A *window* is the rows of one optimizer step. The windows of an epoch depend on the seed, the epoch and the window size
alone; the split into micro-batches and ranks only decides who computes a row. That is why the same rows give the same
step for any split. Every rank gets equally many micro-batches; some may be empty, none is padded with repeated rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from prefopt.errors import DataError

STRATEGIES = ("random", "sequential", "group_by_length", "longest_first")
# Windows that are sorted by length together under `group_by_length`: enough for near-equal lengths inside a window,
# few enough that the order of an epoch stays random.
_WINDOWS_PER_SORT = 50


class WindowSampler(Sampler[list[int]]):
    """A rank-aware batch sampler over rows of known `lengths`: the tokens of the longest backbone row each makes.

    `batch_size` rows a micro-batch and rank, `accumulation` micro-batches a window. Strategies: `random` windows,
    `sequential` ones, `group_by_length` (windows of similar length, in random order, the longest first so that memory
    runs out at once or never), and `longest_first`, a fixed order for evaluation. Inside a window rows are always dealt
    by length, which costs nothing and saves padding; rows of one of the `prompts` (a number a row) stay together, so
    that they can share it. Ranks take the longer rows of a micro-batch in turn.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        strategy: str = "random",
        drop_last: bool = False,
        prompts: Sequence[int] | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown sampling strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.prompts = np.arange(len(lengths)) if prompts is None else np.asarray(prompts, dtype=np.int64)
        self.slot = batch_size * world_size
        self.window = self.slot * accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.strategy = strategy
        self.drop_last = drop_last
        self.epoch = 0
        if drop_last and not len(self):
            raise DataError(f"dataloader_drop_last: {len(lengths)} rows do not fill one step of {self.window}")

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; the loop calls it before each one, resumed ones included."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same on every rank."""
        full, rest = divmod(len(self.lengths), self.window)
        tail = 0 if self.drop_last else math.ceil(rest / self.slot)
        return full * (self.window // self.slot) + tail

    def windows(self) -> list[np.ndarray]:
        """The rows of each optimizer step of this epoch, in order."""
        order = self._order()
        cuts = range(self.window, len(order), self.window)
        windows = np.split(order, cuts) if len(order) else []
        if windows and self.drop_last and len(windows[-1]) < self.window:
            windows.pop()
        return self._shuffle_windows(windows) if self.strategy == "group_by_length" else windows

    def __iter__(self) -> Iterator[list[int]]:
        for window in self.windows():
            rows = self._dealt(window)
            for number, start in enumerate(range(0, len(rows), self.slot)):
                # Back and forth, so that no rank has the longest rows of every micro-batch.
                turn = self.world_size - 1 - self.rank if number % 2 else self.rank
                yield np.array_split(rows[start : start + self.slot], self.world_size)[turn].tolist()

    def _dealt(self, window: np.ndarray) -> np.ndarray:
        """A window's rows in the order they are dealt in: the prompt with the longest row first, its rows together."""
        lengths = self.lengths[window]
        prompt = np.unique(self.prompts[window], return_inverse=True)[1]
        longest = np.zeros(len(window), dtype=np.int64)
        np.maximum.at(longest, prompt, lengths)
        return window[np.lexsort((-lengths, prompt, -longest[prompt]))]

    def _generator(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, purpose])

    def _order(self) -> np.ndarray:
        count = len(self.lengths)
        if self.strategy == "sequential":
            return np.arange(count)
        if self.strategy == "longest_first":
            return np.argsort(-self.lengths, kind="stable")
        order = self._generator(0).permutation(count)
        if self.strategy == "random":
            return order
        chunk = self.window * _WINDOWS_PER_SORT
        parts = [order[start : start + chunk] for start in range(0, count, chunk)]
        return np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts] or [order])

    def _shuffle_windows(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        # The short window stays last, where the loop expects it.
        tail = windows[-1:] if windows and len(windows[-1]) < self.window else []
        full = windows[: len(windows) - len(tail)]
        longest = max(range(len(full)), key=lambda i: int(self.lengths[full[i]].max()), default=0)
        rest = [full[i] for i in self._generator(1).permutation(len(full)) if i != longest]
        return full[longest : longest + 1] + rest + tail
