"""Drafts of a whole data set: kept ones are found again, the others are made by worker processes.

The tokenizer's own threads leave the work around it, which is Python's, to one core; processes share all of it out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from accelerate.utils import patch_environment
from tqdm.auto import tqdm

from prefopt.data.drafts import Draft, Drafter, content_id
from prefopt.data.truncation import Ids
from prefopt.errors import UserError

if TYPE_CHECKING:
    from prefopt.data.formats import Example

CHUNK = 1000
"""Examples that are drafted together. Fewer than this many are neither kept nor shared out: it would take longer."""

# Examples that are worth a process of their own, by the time it takes to start.
_WORTH_A_PROCESS = 2 * CHUNK
# Drafts that are made again before any others are believed.
_CHECKED = 16
# What this process, if it is a worker, works on.
_WORK: list[tuple[Drafter, Sequence[Sequence[Example]]]] = []


class DraftCache(Protocol):
    """Packed drafts by `content_id`, for one tokenizer and its settings."""

    def turn(self) -> AbstractContextManager[bool]:
        """A block that one process of each machine runs first, and the others later; whether this process is first."""

    def missing(self, ids: Collection[bytes]) -> set[bytes]:
        """Those of the ids that are not kept."""

    def read(self, ids: Collection[bytes]) -> Mapping[bytes, Ids]:
        """What is kept and whole."""

    def write(self, drafts: Mapping[bytes, Ids]) -> bool:
        """Keep drafts; False where they cannot be kept."""

    def distrust(self) -> None:
        """Take no draft from it any more: what is kept is not what the tokenizer gives."""


def draft_all(
    examples: Sequence[Example], drafter: Drafter, processes: int | None = None, cache: DraftCache | None = None
) -> Iterator[list[Draft]]:
    """Drafts of the examples, in their order, `CHUNK` at a time.

    `processes`: None for as many as pay on the cores of this machine. Raises what `Drafter.drafts` raises, for the same
    example whatever the number of processes.
    """
    if cache is None:
        yield from _made(examples, drafter, processes)
        return
    ids = [content_id(example, drafter.settings.targets) for example in examples]
    with cache.turn() as first:
        _check(examples, ids, drafter, cache)
        kept = not first or _keep_missing(examples, ids, drafter, processes, cache)
    if not kept:
        yield from _made(examples, drafter, processes)
        return
    for start in range(0, len(examples), CHUNK):
        yield _found(examples[start : start + CHUNK], ids[start : start + CHUNK], drafter, cache)


def process_count(wanted: int | None, examples: int) -> int:
    """How many processes make drafts: as wanted, or one for so many examples up to the cores there are."""
    if wanted is not None:
        return max(1, min(wanted, -(-examples // CHUNK)))
    # Elsewhere a new process imports everything again, the user's own script included.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return max(1, min(cores, examples // _WORTH_A_PROCESS))


def _check(examples: Sequence[Example], ids: Sequence[bytes], drafter: Drafter, cache: DraftCache) -> None:
    """Make some drafts again, and distrust the cache when it has others."""
    places = np.unique(np.linspace(0, len(examples) - 1, _CHECKED).astype(int)).tolist()
    found = cache.read([ids[place] for place in places])
    known = [place for place in places if ids[place] in found]
    fresh = drafter.drafts([examples[place] for place in known])
    if any(not np.array_equal(draft.pack(), found[ids[place]]) for place, draft in zip(known, fresh, strict=True)):
        cache.distrust()


def _keep_missing(
    examples: Sequence[Example], ids: Sequence[bytes], drafter: Drafter, processes: int | None, cache: DraftCache
) -> bool:
    """Make what the cache lacks and keep it; False where it cannot be kept."""
    lacking = cache.missing(ids)
    new = {id: example for id, example in zip(ids, examples, strict=True) if id in lacking}
    names = iter(new)
    for drafts in _made(list(new.values()), drafter, processes):
        if not cache.write({next(names): draft.pack() for draft in drafts}):
            return False
    return True


def _found(examples: Sequence[Example], ids: Sequence[bytes], drafter: Drafter, cache: DraftCache) -> list[Draft]:
    found = cache.read(set(ids))
    lost = [index for index, id in enumerate(ids) if id not in found]
    made = dict(zip(lost, drafter.drafts([examples[index] for index in lost]), strict=True))
    return [made.get(index) or Draft.unpack(found[id]) for index, id in enumerate(ids)]


def _made(examples: Sequence[Example], drafter: Drafter, processes: int | None) -> Iterator[list[Draft]]:
    parts = [examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)]
    count = process_count(processes, len(examples))
    chunks = _by_workers(parts, drafter, count) if count > 1 else map(drafter.drafts, parts)
    with tqdm(total=len(examples), desc="Tokenising", disable=len(examples) <= CHUNK) as bar:
        for drafts in chunks:
            bar.update(len(drafts))
            yield drafts


# Worker processes


def _by_workers(parts: Sequence[Sequence[Example]], drafter: Drafter, count: int) -> Iterator[list[Draft]]:
    # A forked process has examples and tokenizer at once, without a copy.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    # The tokenizer's threads do not outlive a fork, and in every process they would be too many.
    with patch_environment(TOKENIZERS_PARALLELISM="false"):
        pool = ProcessPoolExecutor(count, context, _start_worker, (drafter, parts))
        try:
            for packed in pool.map(_packed_part, range(len(parts))):
                yield [Draft.unpack(draft) for draft in packed]
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises has died; was there too little memory? Write dataset_num_proc: 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(drafter: Drafter, parts: Sequence[Sequence[Example]]) -> None:
    _WORK.append((drafter, parts))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _packed_part(number: int) -> list[Ids]:
    [(drafter, parts)] = _WORK
    return [draft.pack() for draft in drafter.drafts(parts[number])]
