"""`benchmark reference`: several algorithms on one data set, with one store of reference scores and with one each."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from prefopt.benchmark import profiles
from prefopt.benchmark.losses import trainer_for
from prefopt.benchmark.output import Chart, Report, Table
from prefopt.benchmark.setting import Options, device, quiet
from prefopt.benchmark.timing import Spread, clock_of, ratio
from prefopt.losses import Loss, make, names
from prefopt.reference.cached import Account, CachedReference

_STEPS = 32  # of rows: a data set large enough that scoring it outweighs opening a trainer


def run(options: Options) -> Report:
    """Time until each algorithm can begin to train, and the answers scored for it, with one store and with one each."""
    profile = profiles.profile_for("hh", options)
    count = options.batch_size * (1 if options.quick else _STEPS)
    lengths = profile.lengths[np.random.default_rng(options.seed).permutation(len(profile.lengths))[:count]]
    losses = [loss for loss in map(make, names()) if loss.needs.reference == "logp"]
    shared: dict[str, list[float]] = {loss.name: [] for loss in losses}
    apart: dict[str, list[float]] = {loss.name: [] for loss in losses}
    accounts: dict[str, Account] = {}
    for _ in range(options.rounds):
        with quiet(), TemporaryDirectory() as folder:
            for loss in losses:
                seconds, accounts[loss.name] = _open(loss, lengths, options, Path(folder), "one store")
                shared[loss.name].append(seconds)
                seconds, _ = _open(loss, lengths, options, Path(folder), f"store of {loss.name}")
                apart[loss.name].append(seconds)
    report = Report("reference", {**options.about(), "shape": str(options.shape), "clock": clock_of(device()).unit})
    report.add(
        Table(
            f"{len(losses)} algorithms one after the other on {count:,} pairs, seconds until training can begin",
            [
                {
                    "algorithm": name,
                    "answers": account.answers,
                    "found": account.found,
                    "scored": account.scored,
                    "one store": Spread.of(shared[name]),
                    "a store each": Spread.of(apart[name]),
                }
                for name, account in accounts.items()
            ],
        ),
        _sums(shared, apart, accounts),
    )
    report.chart = Chart(
        "Time until training can begin",
        "",
        f"{report.about['clock']}s",
        {
            label: [(name, Spread.of(seconds)) for name, seconds in found.items()]
            for label, found in (("one store", shared), ("a store each", apart))
        },
    )
    return report


def _open(loss: Loss, lengths: np.ndarray, options: Options, folder: Path, store: str) -> tuple[float, Account]:
    """Seconds until a trainer is made, reference scores included, and what it asked of the store."""
    made = []

    def open_trainer() -> None:
        reference = {"source": "cached", "store": str(folder / store)}
        made.append(trainer_for(loss, lengths, options, folder / "run", reference=reference))

    seconds = clock_of(device()).seconds(open_trainer)
    cached = made[0].reference
    assert isinstance(cached, CachedReference)
    return seconds, cached.account


def _sums(shared: dict[str, list[float]], apart: dict[str, list[float]], accounts: dict[str, Account]) -> Table:
    """All algorithms together. A pass is the scoring of as many answers as the data set holds."""
    first = next(iter(accounts.values()))
    one, each = ([sum(round) for round in zip(*found.values(), strict=True)] for found in (shared, apart))
    warm = [seconds for name, found in shared.items() if accounts[name].scored == 0 for seconds in found]
    return Table(
        "Together",
        [
            {
                "passes, one store": sum(account.scored for account in accounts.values()) / first.answers,
                "passes, a store each": sum(account.answers for account in accounts.values()) / first.answers,
                "cold over warm": ratio(shared[next(iter(shared))], warm[: len(one)]),
                "times as fast with one store": ratio(each, one),
            }
        ],
    )
