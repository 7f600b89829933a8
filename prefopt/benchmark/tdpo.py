"""`benchmark tdpo`: losses over the whole vocabulary beside DPO: the head alone, and a step of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig

from prefopt.benchmark import profiles
from prefopt.benchmark.heads import (
    HEAD_WAYS,
    PRODUCTS,
    HeadInputs,
    HeadShape,
    HeadWay,
    one_head_step,
)
from prefopt.benchmark.memory import peak_of
from prefopt.benchmark.output import Cell, Chart, Report, Table
from prefopt.benchmark.runs import trained_in_turns
from prefopt.benchmark.setting import Options, Shape, device, our_trainer, quiet, settings
from prefopt.benchmark.timing import Spread, Times, clock_of, ratio, take_turns
from prefopt.trainer import PreferenceTrainer

# One axis at a time, from the middle.
SHAPES = (
    *(HeadShape(256, 512, vocabulary) for vocabulary in (8192, 32768, 131072)),
    *(HeadShape(256, width, 32768) for width in (256, 1024, 2048)),
)
QUICK_SHAPES = (HeadShape(16, 8, 64), HeadShape(16, 8, 256))
_MIB = 2**20


@dataclass(frozen=True)
class StepWay:
    """A step of the trainer: the loss, where its reference comes from, and whether only an adapter trains."""

    loss: str
    source: str
    adapter: bool = False

    @property
    def name(self) -> str:
        return f"{self.loss}, adapter, {self.source}" if self.adapter else f"{self.loss}, {self.source}"

    def trainer(self, rows: Any, options: Options, folder: Path) -> PreferenceTrainer:
        """A trainer of this kind on these rows, the prompt shared."""
        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if self.adapter else None
        given = settings(options, folder / self.name.replace(", ", "_"), row_layout="shared")
        return our_trainer(rows, options.shape, given, self.loss, adapter=adapter, source=self.source)


STEP_WAYS = (
    StepWay("dpo", "cached"),
    StepWay("tdpo1", "live"),
    StepWay("tdpo2", "live"),
    StepWay("tdpo2", "cached"),
    StepWay("dpo", "cached", adapter=True),
    StepWay("tdpo2", "live", adapter=True),
    StepWay("tdpo2", "cached", adapter=True),
)


PARTS = ("head", "memory", "step")


def run(options: Options, parts: tuple[str, ...] = PARTS) -> Report:
    """Time and peak memory of the head for each shape, then a step of the trainer for each loss."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    report = Report("tdpo", {**options.about(), "clock": clock_of(device()).unit})
    ways = HEAD_WAYS
    lines: dict[str, list[tuple[Any, Spread]]] = {way.name: [] for way in ways if way.kind != "floor"}
    for shape in shapes if "head" in parts else ():
        times = _time(shape, ways, options)
        report.add(_costs(shape, times, ways))
        for name, points in lines.items():
            points.append((str(shape), ratio(times[name], times["dpo, prefopt"])))
    few = (shapes[:1], ways[:1]) if options.quick else (shapes, ways)  # each takes a process
    if "memory" in parts:
        report.add(_peaks(*few, options.threads))
    if "step" in parts:
        report.add(_steps(options))
    if "head" in parts:
        report.chart = Chart("Head, forward and backward", "", "times DPO in prefopt", lines)
    return report


def _time(shape: HeadShape, ways: tuple[HeadWay, ...], options: Options) -> Times:
    inputs = HeadInputs(shape)
    steps = {way.name: partial(way.step, inputs) for way in ways}
    return take_turns(steps, rounds=options.rounds, steps=1, clock=clock_of(device()))


def _costs(shape: HeadShape, times: Times, ways: tuple[HeadWay, ...]) -> Table:
    rows: list[dict[str, Cell]] = []
    for way in ways:
        if way.kind == "floor":
            continue
        own = times[way.name]
        rows.append(
            {
                "head": way.name,
                "ms": Spread.of([1000 * seconds for seconds in own]),
                "times DPO": ratio(own, times["dpo, prefopt"]),
                "products at least": PRODUCTS[way.loss] if way.kind == "prefopt" else None,
                "times its floor": ratio(own, times[f"{way.loss}, floor"]) if way.kind == "prefopt" else None,
                "times DPO, head frozen": ratio(own, times["dpo, frozen"]) if way.kind == "frozen" else None,
            }
        )
    return Table(f"Head, forward and backward, {shape}", rows)


def _peaks(shapes: tuple[HeadShape, ...], ways: tuple[HeadWay, ...], threads: int) -> Table:
    """Each in a process of its own. The gradient of the head, `[V, H]`, is part of it and cannot be spared."""
    rows: list[dict[str, Cell]] = []
    for shape in shapes:
        gradient = 4 * shape.vocabulary * shape.width / _MIB
        row: dict[str, Cell] = {"shape": str(shape), "gradient of the head": gradient}
        for way in ways:
            if way.kind != "floor":
                peak = peak_of(one_head_step, shape, way, threads=threads).added / _MIB
                row[way.name] = max(0, round(peak - gradient * (way.kind != "frozen")))
        rows.append(row)
    return Table("Peak memory of the head beside its gradient, MiB", rows)


def _steps(options: Options) -> Table:
    """Steps of the trainer on HH lengths; DPO's reference is cached, and adapters leave the head frozen."""
    profile = profiles.profile_for("hh", options)
    lengths = profile.lengths[profiles.steps_of(profile, options)]
    rows = profiles.token_rows(lengths.reshape(-1, 3), vocabulary=options.shape.vocabulary, seed=options.seed)
    with quiet(), TemporaryDirectory() as folder:
        trainers: dict[str, Any] = {way.name: way.trainer(rows, options, Path(folder)) for way in STEP_WAYS}
        body = trainers["dpo, cached"].model.num_parameters(exclude_embeddings=True) - _head_size(options.shape)
        times = trained_in_turns(trainers, options)
    read, scored = int(lengths.sum()), int(lengths[..., 1:].sum())
    dpo = _flops("dpo", "cached", body, read, scored, options.shape)
    lines: list[dict[str, Cell]] = []
    for way in STEP_WAYS:
        base = times["dpo, adapter, cached" if way.adapter else "dpo, cached"]
        flops = _flops(way.loss, way.source, body, read, scored, options.shape)
        lines.append(
            {
                "step": way.name,
                "seconds": Spread.of([seconds / options.steps for seconds in times[way.name]]),
                "times dpo": ratio(times[way.name], base),
                "flops, times dpo": None if way.adapter else flops / dpo,
            }
        )
    return Table(f"Step of the trainer, {profile.name} lengths, float32, {options.shape}", lines)


def _head_size(shape: Shape) -> int:
    return shape.vocabulary * shape.width


def _flops(loss: str, source: str, body: int, read: int, scored: int, shape: Shape) -> float:
    """Of matrix products with parameters: six a token and parameter of the body, two more with a live reference."""
    return (8 if source == "live" else 6) * body * read + PRODUCTS[loss] * 2 * scored * _head_size(shape)
