"""`benchmark scaling`: how the gain over TRL, and the distance to the floor, change along one axis at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prefopt.benchmark.output import Cell, Chart, Report, Table
from prefopt.benchmark.profiles import Profile, made_up
from prefopt.benchmark.setting import Options, Shape, device
from prefopt.benchmark.timing import Spread, clock_of, ratio
from prefopt.benchmark.ways import BEST, FLOOR, GROUPED, WAYS, Work, measure

_SPREADS = (0.5, 0.5, 0.5)  # of the logarithms of the lengths
_MEANS = (120.0, 50.0, 50.0)
_SHAPE = Shape()


@dataclass(frozen=True)
class Point:
    """A place on an axis: what differs from the middle, where all axes meet."""

    label: str
    means: tuple[float, float, float] = _MEANS
    batch_size: int | None = None
    shape: Shape = _SHAPE

    def profile(self, seed: int) -> Profile:
        """Rows of the lengths of this point."""
        return made_up("made up", self.means, _SPREADS, seed=seed)


def _length(factor: float) -> Point:
    return Point(f"x{factor:g}", means=(factor * _MEANS[0], factor * _MEANS[1], factor * _MEANS[2]))


def _prompt_share(share: float) -> Point:
    """Prompts and answers of which a shared row is as long as in the middle."""
    total = sum(_MEANS)
    return Point(f"{share:.0%}", means=(share * total, (1 - share) * total / 2, (1 - share) * total / 2))


AXES: dict[str, tuple[str, Callable[[Any], Point], tuple[Any, ...]]] = {
    "length": ("length of prompts and answers", _length, (0.5, 1, 2, 4)),
    "prompt": ("share of the prompt in a row of prompt and both answers", _prompt_share, (0.1, 0.3, 0.5, 0.7, 0.9)),
    "batch": ("pairs of a step", lambda pairs: Point(str(pairs), batch_size=pairs), (2, 4, 8, 16)),
    "vocabulary": ("vocabulary", lambda size: Point(str(size), shape=Shape(vocabulary=size)), (2048, 8192, 32768)),
    "model": (
        "width of the model",
        lambda width: Point(str(width), shape=Shape(width=width, intermediate=3 * width)),
        (128, 256, 512),
    ),
}


def run(options: Options, axes: tuple[str, ...] = tuple(AXES)) -> Report:
    """Each way at each point, in turns; rounds are those of a point."""
    report = Report("scaling", {**options.about(), "means": str(_MEANS), "clock": clock_of(device()).unit})
    ways = tuple(way for way in WAYS if way.grouped)
    lines: dict[str, list[tuple[Any, Spread]]] = {}
    for axis in axes:
        title, _, _ = AXES[axis]
        rows: list[dict[str, Cell]] = []
        for point in _points(axis, options):
            size = point.batch_size or options.batch_size
            work = Work.of(point.profile(options.seed), replace(options, batch_size=size), point.shape)
            times, loads = measure(work, ways)
            best = times[BEST.name]
            rates: dict[str, Cell] = {
                way.name: Spread.of([loads[way.name].pairs / seconds for seconds in times[way.name]]) for way in ways
            }
            gain = ratio(times[GROUPED.name], best)
            rows.append(
                {title: point.label, **rates, "times TRL": gain, "of the floor": ratio(times[FLOOR.name], best)}
            )
            lines.setdefault(axis, []).append((f"{axis} {point.label}", gain))
        report.add(Table(f"Pairs per second and ratios of {BEST.name}, by {title}", rows))
    report.chart = Chart(f"{BEST.name}, by axis", "", "times TRL with lengths grouped", lines)
    return report


def _points(axis: str, options: Options) -> Iterator[Point]:
    _, make, values = AXES[axis]
    for value in values[:2] if options.quick else values:
        point = make(value)
        yield replace(point, shape=options.shape, means=(8.0, 4.0, 4.0)) if options.quick else point
