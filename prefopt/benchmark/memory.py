"""Peak memory of a piece of work in a process of its own, where nothing that ran before has left its mark."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Peak:
    """Bytes: `before` the work, with all that is imported, and at its `peak`. On a GPU, of its memory."""

    before: int
    peak: int

    @property
    def added(self) -> int:
        """Bytes the work itself took at most."""
        return self.peak - self.before


def peak_of(work: Callable[..., Any], *arguments: Any, threads: int = 1) -> Peak:
    """Run `work(*arguments)` in a new process. `work` is a function of a module, and its arguments can be pickled.

    `work` may yield once, when it has made what should not count; without that, all it makes counts.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, arguments, threads).result()


def _measured(work: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> Peak:
    torch.set_num_threads(threads)
    before = _used()
    steps = work(*arguments)
    if steps is not None:
        next(steps)
        before = _used()
        _forget_peak()
        next(steps, None)
    return Peak(before, _peak())


def _used() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or _largest()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _largest()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")  # Linux: the peak starts again from what is held now


def _status(field: str) -> int:
    """A line of `/proc/self/status` in bytes, 0 where there is none.

    `getrusage` would do, but its peak is that of the process this one was started from, if that was larger.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _largest() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
