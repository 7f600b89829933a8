"""Whole training runs that go one step at a time, so that trainers can take turns.

Each trainer's own `train()` runs, loader, clipping, optimizer, callbacks and log included, in a thread that stands
still between steps. Only one thread moves at any time, so the processor time of the process is that of its step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl

from prefopt.benchmark.setting import Options, device
from prefopt.benchmark.timing import Step, Times, clock_of, take_turns


class Paced(TrainerCallback):
    """`trainer.train()`, a step for each call of `step`. Call `close` at the end, also when a step failed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._go, self._rest = threading.Semaphore(0), threading.Semaphore(0)
        self._leaves = False
        trainer.add_callback(self)
        self._pool = ThreadPoolExecutor(1)
        self._done: Future[Any] = self._pool.submit(trainer.train)
        self._done.add_done_callback(lambda _: self._rest.release())
        self._rest.acquire()

    def step(self) -> None:
        """One optimizer step. Raises what training raises, and `RuntimeError` when there is none left."""
        if not self._done.done():
            self._go.release()
            self._rest.acquire()
        if self._done.done():
            self._done.result()
            raise RuntimeError("this training run is over: it was made for fewer steps")

    def close(self) -> None:
        """End the run where it stands."""
        self._leaves = True
        self._go.release()
        self._pool.shutdown()

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stand still before the first step."""
        self._stand_still(control)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stand still after each."""
        self._stand_still(control)

    def _stand_still(self, control: TrainerControl) -> None:
        if not self._leaves:
            self._rest.release()
            self._go.acquire()
        control.should_training_stop = control.should_training_stop or self._leaves


@contextmanager
def paced(trainers: dict[str, Trainer]) -> Iterator[dict[str, Paced]]:
    """Runs of several trainers, ended however the block ends."""
    runs: dict[str, Paced] = {}
    try:
        for name, trainer in trainers.items():
            runs[name] = Paced(trainer)
        yield runs
    finally:
        for run in runs.values():
            run.close()


def trained_in_turns(trainers: dict[str, Trainer], options: Options, **others: Step) -> Times:
    """Seconds a round of each trainer's own training and of `others`, a step of each after the other."""
    with paced(trainers) as runs:
        steps = {**{name: run.step for name, run in runs.items()}, **others}
        return take_turns(steps, rounds=options.rounds, steps=options.steps, clock=clock_of(device()))
