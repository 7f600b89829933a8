"""`benchmark losses`: a step of the trainer with every registered loss, beside DPO's on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from prefopt.benchmark import profiles
from prefopt.benchmark.output import Chart, Report, Table
from prefopt.benchmark.runs import trained_in_turns
from prefopt.benchmark.setting import Options, device, our_trainer, quiet, settings
from prefopt.benchmark.timing import Spread, clock_of, ratio
from prefopt.errors import UserError
from prefopt.losses import Loss, make, names
from prefopt.trainer import PreferenceTrainer

_TO = "dpo"


def run(options: Options) -> Report:
    """The median step of each loss; those that need other rows than pairs of text are named and left out."""
    profile = profiles.profile_for("hh", options)
    lengths = profile.lengths[profiles.steps_of(profile, options)].reshape(-1, 3)
    report = Report("losses", {**options.about(), "shape": str(options.shape), "clock": clock_of(device()).unit})
    trainers: dict[str, PreferenceTrainer] = {}
    with quiet(), TemporaryDirectory() as folder:
        for name in names():
            try:
                trainers[name] = trainer_for(make(name), lengths, options, Path(folder) / name)
            except UserError as error:
                report.notes.append(f"{name} is left out: {error}")
        times = trained_in_turns(dict(trainers), options)
    relative = {name: ratio(seconds, times[_TO]) for name, seconds in times.items()}
    report.add(
        Table(
            f"A step of {options.batch_size} pairs, {profile.name} lengths, float32",
            [
                {
                    "loss": name,
                    "reference": trainers[name].objective.reference,
                    "seconds": Spread.of([seconds / options.steps for seconds in times[name]]),
                    f"times {_TO}": relative[name],
                }
                for name in sorted(times, key=lambda name: relative[name].median)
            ],
        )
    )
    report.chart = Chart("A step of the trainer", "", f"times {_TO}", {"step": list(relative.items())})
    return report


def trainer_for(loss: Loss, lengths: np.ndarray, options: Options, folder: Path, **changes: Any) -> PreferenceTrainer:
    """A trainer for a loss on pairs of these lengths `[n, 3]`, with values for the columns it declares.

    A loss with mismatched answers reads pairs as single answers, so its steps hold two rows a pair.
    """
    rows = [
        {**row, "columns": _columns(loss)}
        for row in profiles.token_rows(lengths, vocabulary=options.shape.vocabulary, seed=options.seed)
    ]
    rows_of_a_step = options.batch_size * (2 if loss.needs.mismatched else 1)
    given = settings(options, folder, per_device_train_batch_size=rows_of_a_step)
    return our_trainer(rows, options.shape, given, loss, **changes)


def _columns(loss: Loss) -> Mapping[str, float]:
    """Values no loss objects to: the chosen answer's are above the rejected one's.

    Of optional columns the scores are given, which ODPO needs where it has no offset.
    """
    scores = [name for name in loss.needs.optional_columns if name.startswith("score_")]
    return {name: 0.0 if "rejected" in name else 1.0 for name in (*loss.needs.columns, *scores)}
