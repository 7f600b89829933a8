"""The ways to do a DPO step that are compared: TRL's, ours, and the floor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import Trainer

from prefopt.benchmark.floor import Floor
from prefopt.benchmark.profiles import Profile, steps_of, token_rows
from prefopt.benchmark.runs import trained_in_turns
from prefopt.benchmark.setting import Options, Shape, our_trainer, quiet, settings, trl_trainer
from prefopt.benchmark.timing import Times


@dataclass(frozen=True)
class Way:
    """A trainer, by `maker`, and what it is fed. `reads_once`: prompts are read once for both answers."""

    name: str
    maker: str
    grouped: bool = True
    reads_once: bool = False
    layout: str = ""


AS_DOCUMENTED = Way("TRL, rows in random order", "trl", grouped=False)
GROUPED = Way("TRL, lengths grouped", "trl")
PLAIN = Way("prefopt, plain rows", "prefopt", layout="plain")
SHARED = Way("prefopt, prompt shared", "prefopt", layout="shared", reads_once=True)
FLOOR = Way("floor", "floor", reads_once=True)

# Each does one thing more than the one before it.
WAYS = (AS_DOCUMENTED, GROUPED, PLAIN, SHARED, FLOOR)
BEST = WAYS[-2]
CAUSES = {GROUPED: "lengths grouped", PLAIN: "head on scored positions", SHARED: "prompt shared"}


@dataclass(frozen=True)
class Work:
    """The same pairs per step for every way: lengths `[steps, pairs, 3]`, grouped by length or not."""

    options: Options
    shape: Shape
    precision: str
    grouped: np.ndarray
    mixed: np.ndarray

    @classmethod
    def of(cls, profile: Profile, options: Options, shape: Shape, precision: str = "float32") -> Work:
        """Steps that stand for an epoch of a profile."""
        grouped, mixed = (profile.lengths[steps_of(profile, options, grouped=each)] for each in (True, False))
        return cls(options, shape, precision, grouped, mixed)

    def lengths(self, way: Way) -> np.ndarray:
        """The lengths a way is fed."""
        return self.grouped if way.grouped else self.mixed

    def trainer(self, way: Way, folder: Path) -> Trainer:
        """The trainer of a way, with its reference scored."""
        rows = token_rows(self.lengths(way).reshape(-1, 3), vocabulary=self.shape.vocabulary, seed=self.options.seed)
        given = settings(self.options, folder / way.name, precision=self.precision)
        if way.maker == "trl":
            return trl_trainer(rows, self.shape, given)
        return our_trainer(rows, self.shape, given, row_layout=way.layout)


@dataclass(frozen=True)
class Load:
    """What a way reads in a round: pairs, tokens when each prompt is read once, and the share of padding."""

    pairs: int
    unique: int
    padding: float


def measure(work: Work, ways: tuple[Way, ...] = WAYS) -> tuple[Times, dict[str, Load]]:
    """Seconds a round of each way, in turns, and what it read in that time."""
    with quiet(), TemporaryDirectory() as folder:
        trainers = {way.name: work.trainer(way, Path(folder)) for way in ways if way.maker != "floor"}
        loads = {way.name: _load(work, way, trainers.get(way.name)) for way in ways}
        by_hand = {way.name: _floor(work).step for way in ways if way.maker == "floor"}
        times = trained_in_turns(trainers, work.options, **by_hand)
    return times, loads


def one_round(work: Work, way: Way) -> None:
    """A round of a way and nothing else, for a process of its own."""
    with quiet(), TemporaryDirectory() as folder:
        if way.maker == "floor":
            floor = _floor(work)
            for _ in range(work.options.steps):
                floor.step()
        else:
            trainer = work.trainer(way, Path(folder))
            trainer.args.num_train_epochs = 1
            trainer.train()


def _floor(work: Work) -> Floor:
    return Floor(work.shape, list(work.lengths(FLOOR)), work.precision)


def _load(work: Work, way: Way, trainer: Any) -> Load:
    lengths = work.lengths(way)
    unique = int(lengths.sum())
    if trainer is None:
        return Load(lengths.shape[0] * lengths.shape[1], unique, 0.0)
    rows = trainer.train_dataset
    steps = [range(start, start + lengths.shape[1]) for start in range(0, len(rows), lengths.shape[1])]
    laid_out = sum(trainer.data_collator([rows[index] for index in step])["input_ids"].numel() for step in steps)
    real = unique if way.reads_once else unique + int(lengths[..., 0].sum())
    return Load(lengths.shape[0] * lengths.shape[1], unique, 1 - real / laid_out)
