"""What processes wait for: the answer or the refusal of the one that decides for all, and the files of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.errors import UserError

Answer = TypeVar("Answer")
_PAUSE = 0.5  # seconds


def on_main(action: Callable[[], Answer]) -> Answer:
    """What `action` gives on the main process, on every rank; its `UserError` is raised on every rank as well.

    Every rank must call this. The answer is pickled on its way.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found = [action(), None]
        except UserError as error:
            found = [None, error]
    answer, refusal = broadcast_object_list(found)
    if refusal is not None:
        raise refusal
    return answer


def wait_for_files(paths: Iterable[Path]) -> None:
    """Return on every rank when all these files are there, which the ranks share the writing of.

    However long the slowest one takes: a barrier alone would give up after the time that is set for collectives. Where
    a rank fails, the launcher ends those that wait for it.
    """
    for path in paths:
        while not path.is_file():
            time.sleep(_PAUSE)
    PartialState().wait_for_everyone()


@contextmanager
def first_on_machine() -> Iterator[bool]:
    """A block that one process of each machine runs before its others do; whether this process is that one.

    Every rank must call this. The others go on even where the first one fails, to fail in the same way.
    """
    state = PartialState()
    first = state.is_local_main_process
    if not first:
        state.wait_for_everyone()
    try:
        yield first
    finally:
        if first:
            state.wait_for_everyone()
