"""Scoring the answers that a store lacks: all ranks together, in large batches, one run at a time.

Only the main process touches the store. The others score their share and receive what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from prefopt.console import say
from prefopt.data.collation import Batch, Collator
from prefopt.errors import UserError
from prefopt.reference.answers import Answer, batches_of, plan_of_answers
from prefopt.reference.rows import is_finite
from prefopt.reference.store import Entry, Lease
from prefopt.reference.stored import as_array

Scores = dict[bytes, Any]  # arrays or, where those stay in the store, their places

# Seconds between two looks at what another run has written, two commits of one's own, and two lines where there is no
# terminal for a bar.
POLL = 2.0
COMMIT = 5.0
SAY = 60.0
# Looks that bring nothing of what is wanted, after which the other run is taken to score other answers.
_IDLE = 30
_AT_ONCE = 64


class Filler:
    """Brings the scores of answers from an entry of the store, and computes those it lacks.

    `score` maps a batch on the device to its numbers, `[M]` or `[M, D]`. `rows` is the number of the longest answers in
    a batch. With `place`, a function of ids, arrays stay in the store, and their places are brought. Every rank calls
    every method, in the same order.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        entry: Entry | None,
        score: Callable[[Batch], Tensor],
        collator: Collator,
        rows: int,
        place: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.entry = entry  # None on all ranks but the main one
        self.score = score
        self.collator = collator
        self.rows = rows
        self.place = place
        self._full = False

    def read(self, answers: Mapping[bytes, Answer]) -> Scores:
        """The scores that are in the store already, on every rank."""
        if self.place is None:
            found: Scores = self._told(lambda entry: entry.read(answers))
            return found
        return {id: self.place(id) for id in self._told(lambda entry: _whole(entry, answers))}

    def fill(self, answers: Mapping[bytes, Answer], found: Scores) -> tuple[Scores, int]:
        """Scores of the `answers` that were not `found` in the store, and how many of them this run computed."""
        done: Scores = {}
        announced, idle = "", 0
        while missing := {id: answer for id, answer in answers.items() if id not in found and id not in done}:
            lease, holder = self._lease()
            if not holder or idle > _IDLE:
                with lease or nullcontext():
                    done.update(self.read(missing))  # the run before may have ended its work between two looks
                    rest = missing.keys() - done.keys()
                    return {**done, **self._compute(answers, rest)}, len(rest)
            if holder != announced:
                say(f"reference: {holder} is scoring for this store; waiting for what it finds")
                announced = holder
            time.sleep(POLL)
            others = self.read(missing)
            idle = 0 if others else idle + 1
            done.update(others)
        return done, 0

    def _lease(self) -> tuple[Lease | None, str]:
        """The lease where this is the main process and got it, and, on every rank, who has it otherwise."""
        lease = self.entry.lease() if self.entry is not None else None
        holder = ""
        if self.entry is not None and lease is None:
            holder = self.entry.holder() or "another run"
        return lease, broadcast_object_list([holder])[0]

    def _compute(self, answers: Mapping[bytes, Answer], missing: Collection[bytes]) -> Scores:
        """Score answers on all ranks, and write them as they come: a run that is killed goes on where it was."""
        batches = batches_of(answers, self.rows, missing)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        done: Scores = {}
        fresh: Scores = {}
        written = said = time.monotonic()
        quiet = not self.accelerator.is_main_process or not missing
        with tqdm(total=len(missing), desc="reference", unit=" answers", disable=True if quiet else None) as bar:
            for first in range(0, len(batches), world):
                # Each rank takes part in each round, with nothing if need be: a sharded model waits for all.
                mine = batches[first + rank] if first + rank < len(batches) else []
                for part in gather_object([self._tried(mine, answers)]):
                    _refuse(part, answers)
                    fresh.update(part)
                    bar.update(len(part))
                if bar.disable and time.monotonic() - said > SAY:
                    say(f"reference: {len(done) + len(fresh):,} of {len(missing):,} answers are scored")
                    said = time.monotonic()
                if time.monotonic() - written > COMMIT:
                    done.update(self._write(fresh))
                    fresh, written = {}, time.monotonic()
        done.update(self._write(fresh))
        return done

    def _tried(self, ids: Sequence[bytes], answers: Mapping[bytes, Answer]) -> Scores | str:
        """Scores, or why there are none: a rank that runs out of memory must not leave the others waiting."""
        try:
            return self._scores(ids, answers)
        except torch.OutOfMemoryError as error:
            return str(error).splitlines()[0]

    def _scores(self, ids: Sequence[bytes], answers: Mapping[bytes, Answer]) -> Scores:
        chosen = [answers[id] for id in ids]
        batch = plan_of_answers(chosen, self.collator)
        flat = as_array(self.score(send_to_device(batch, self.accelerator.device)))
        ends = np.cumsum([answer.length for answer in chosen])
        return dict(zip(ids, np.split(flat, ends[:-1]) if len(ids) else [], strict=True))

    def rescored(self, ids: Sequence[bytes], answers: Mapping[bytes, Answer]) -> Scores:
        """Scores of a few answers, computed anew on every rank, each alone: never in the batches of the fill."""
        return {id: scores for one in ids for id, scores in self._scores([one], answers).items()}

    def _write(self, scores: Scores) -> Scores:
        """Keep scores in the store; where it takes no more, this run still has those that lie in memory."""
        if self.place is not None:
            self._told(lambda entry: entry.write(scores))
            return {id: self.place(id) for id in scores}
        if self.entry is not None and scores and not self._full:
            try:
                self.entry.write(scores)
            except UserError as error:
                self._full = True
                say(f"reference: the scores are not kept for later runs: {error}")
        return scores

    def _told(self, ask: Callable[[Entry], Any]) -> Any:
        """What the main process finds in the store, or the `UserError` it meets, on every rank."""
        answer: list[Any] = [None, None]
        if self.entry is not None:
            try:
                answer[0] = ask(self.entry)
            except UserError as error:
                answer[1] = str(error)
        found, problem = broadcast_object_list(answer)
        if problem is not None:
            raise UserError(problem)
        return found


def _refuse(scores: Scores | str, answers: Mapping[bytes, Answer]) -> None:
    if isinstance(scores, str):
        raise UserError(f"the reference ran out of memory: {scores} Write a lower reference.batch_size")
    for id, values in scores.items():
        if not is_finite(values):
            raise UserError(
                f"the reference model gives an answer of {answers[id].tokens} tokens a score that is not finite: its "
                "weights are damaged, or its precision is too low. Try dtype: float32, or look at `reference.model`."
            )


def _whole(entry: Entry, ids: Collection[bytes]) -> list[bytes]:
    """Those of the ids whose rows are there and verify, read a few at a time: all together may not fit in memory."""
    rest, found = iter(sorted(ids)), list[bytes]()
    while part := list(islice(rest, _AT_ONCE)):
        found += entry.read(part)
    return found
