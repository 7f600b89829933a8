"""`benchmark dpo`: a training step of TRL's trainer, of ours, and of the floor, and what the difference is made of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from prefopt.benchmark import profiles
from prefopt.benchmark.memory import peak_of
from prefopt.benchmark.output import Cell, Chart, Report, Table
from prefopt.benchmark.setting import PRECISIONS, SMALL, Options, device, our_trainer, quiet, settings, trl_trainer
from prefopt.benchmark.shares import shares_of
from prefopt.benchmark.timing import Spread, Times, clock_of, ratio
from prefopt.benchmark.ways import (
    AS_DOCUMENTED,
    BEST,
    CAUSES,
    FLOOR,
    GROUPED,
    PLAIN,
    WAYS,
    Load,
    Work,
    measure,
    one_round,
)

CURVE_STEPS, CURVE_EPOCHS = 50, 10
CURVE_RATE = 0.3  # the model of the curves is small, and at this rate its loss moves
AGREEMENT = 1e-4
_MIB = 2**20
# The model of the curves is small, and this rate moves its loss without throwing it about.
_CURVE_RATE = 0.05


def run(options: Options, names: tuple[str, ...] = profiles.NAMES, precisions: tuple[str, ...] = PRECISIONS) -> Report:
    """Time, ratios, causes, memory and the profile of a step, for each length profile and precision."""
    report = Report("dpo", {**options.about(), "shape": str(options.shape), "clock": clock_of(device()).unit})
    lines: dict[str, list[tuple[Any, Spread]]] = {way.name: [] for way in WAYS}
    for name in names:
        profile = profiles.profile_for(name, options)
        for precision in precisions:
            work = Work.of(profile, options, options.shape, precision)
            times, loads = measure(work)
            title = f"{name} lengths ({profile.source}), {precision}"
            report.add(_rates(title, times, loads), _ratios(title, times), _causes(title, times))
            for way in WAYS:
                lines[way.name].append((f"{name}, {precision}", _rate(times[way.name], loads[way.name].pairs)))
        work = Work.of(profile, options, options.shape)
        report.add(_memory(f"{name} lengths, float32", work), _shares(f"{name} lengths, float32", work))
    report.notes.append(
        "Both trainers: reference scored beforehand, activations kept, AdamW, clipping, the loop's own callbacks and "
        "log. TRL's fused head runs here as its installed version chooses: on scored positions with Triton, on all "
        "positions without. "
        "The factor `head on scored positions` is TRL against prefopt on the same rows, so it holds all else that "
        "differs between them."
    )
    report.chart = Chart("Pairs per second of one DPO step", "", f"pairs per {report.about['clock']}", lines)
    return report


def check(options: Options) -> Report:
    """Losses of 50 steps of SGD on the same rows in the same order, ours beside TRL's, in float32."""
    profile = profiles.profile_for("hh", options)
    epochs = 1 if options.quick else CURVE_EPOCHS
    order = profiles.windows(
        profile, batch_size=options.batch_size, count=CURVE_STEPS // CURVE_EPOCHS, grouped=False, seed=options.seed
    )
    rows = profiles.token_rows(profile.lengths[np.concatenate(order)], vocabulary=SMALL.vocabulary)
    changes: dict[str, Any] = {
        "learning_rate": CURVE_RATE, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_steps": 1, "num_train_epochs": epochs,
    }  # fmt: skip
    with quiet(), TemporaryDirectory() as folder:
        ours = _curve(our_trainer(rows, SMALL, settings(options, Path(folder) / "prefopt", **changes)))
        theirs = _curve(trl_trainer(rows, SMALL, settings(options, Path(folder) / "trl", **changes)))
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    shown = sorted({0, len(ours) // 4, len(ours) // 2, 3 * len(ours) // 4, len(ours) - 1})
    report = Report("dpo_check", {**options.about(), "shape": str(SMALL), "learning_rate": CURVE_RATE})
    title = f"Losses of {len(ours)} steps of {options.batch_size} pairs, SGD, float32, dropout off"
    report.add(
        Table(title, [{"step": i + 1, "prefopt": f"{ours[i]:.6f}", "TRL": f"{theirs[i]:.6f}"} for i in shown]),
        Table("Agreement", [{"largest difference": apart, "allowed": AGREEMENT, "agree": str(apart <= AGREEMENT)}]),
    )
    curves = {
        label: [(step + 1, Spread(loss, loss, loss)) for step, loss in enumerate(curve)]
        for label, curve in (("prefopt", ours), ("TRL", theirs))
    }
    report.chart = Chart("DPO loss on the same rows", "step", "loss", curves)
    return report


def _curve(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _rate(seconds: list[float], amount: int) -> Spread:
    return Spread.of([amount / second for second in seconds])


def _rates(title: str, times: Times, loads: dict[str, Load]) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, seconds in times.items():
        load = loads[name]
        rows.append(
            {
                "way": name,
                "pairs/s": _rate(seconds, load.pairs),
                "unique tokens/s": round(load.unique / Spread.of(seconds).median),
                "padding": f"{load.padding:.0%}",
            }
        )
    return Table(f"{title}: rates", rows)


def _ratios(title: str, times: Times) -> Table:
    best = times[BEST.name]
    rows: list[dict[str, Cell]] = [
        {"figure": "times as fast as TRL as documented", "ratio": ratio(times[AS_DOCUMENTED.name], best)},
        {"figure": "times as fast as TRL at its best", "ratio": ratio(times[GROUPED.name], best)},
        {"figure": "of the floor's speed", "ratio": ratio(times[FLOOR.name], best)},
    ]
    if BEST is not PLAIN:
        rows.append({"figure": "times as fast as plain rows", "ratio": ratio(times[PLAIN.name], best)})
    return Table(f"{title}: {BEST.name}", rows)


def _causes(title: str, times: Times) -> Table:
    steps = [(before, after) for before, after in pairwise(WAYS) if after in CAUSES]
    return Table(
        f"{title}: the gain by cause (the factors multiply)",
        [{"cause": CAUSES[after], "factor": ratio(times[before.name], times[after.name])} for before, after in steps],
    )


def _memory(title: str, work: Work) -> Table:
    ways = (GROUPED,) if work.options.quick else WAYS  # each takes a process
    peaks = {way: peak_of(one_round, work, way, threads=work.options.threads) for way in ways}
    against = peaks[GROUPED]
    return Table(
        f"{title}: peak memory of a process of its own, MiB",
        [
            {
                "way": way.name,
                "imports": round(peak.before / _MIB),
                "peak": round(peak.peak / _MIB),
                "of TRL's": peak.peak / against.peak,
                "of TRL's, imports left out": peak.added / against.added,
            }
            for way, peak in peaks.items()
        ],
    )


def _shares(title: str, work: Work) -> Table:
    rows: list[dict[str, Cell]] = []
    for way in (GROUPED, BEST):
        with quiet(), TemporaryDirectory() as folder:
            trainer = work.trainer(way, Path(folder))
            trainer.args.num_train_epochs = 2
            rows.append({"way": way.name, **{part: f"{share:.1%}" for part, share in shares_of(trainer).items()}})
    return Table(f"{title}: where a step's time goes", rows)
