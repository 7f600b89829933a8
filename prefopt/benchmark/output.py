"""How a benchmark speaks: tables in plain text, the same figures as JSON, and a plot of the ones that matter."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefopt.benchmark.timing import Spread

Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Table:
    """Rows under one title; every row has the same columns."""

    title: str
    rows: list[dict[str, Cell]]

    def __str__(self) -> str:
        lines = [list(self.rows[0]), *([_text(cell) for cell in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in padded)])


@dataclass(frozen=True)
class Chart:
    """Points by line, drawn as lines over numbers and as bars over names."""

    title: str
    x: str
    y: str
    lines: Mapping[str, list[tuple[Any, Spread]]]


@dataclass
class Report:
    """What a benchmark found, with the settings it was found under."""

    name: str
    about: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chart: Chart | None = None

    def __str__(self) -> str:
        return "\n\n".join([self.title, *map(str, self.tables), *self.notes])

    @property
    def title(self) -> str:
        """The benchmark and its settings."""
        return f"{self.name}: " + ", ".join(f"{name} {value}" for name, value in self.about.items())

    def add(self, *tables: Table) -> None:
        """Keep tables, and print them at once: the next ones may take minutes, or never come."""
        for table in tables:
            print("\n" + str(table), flush=True)
            self.tables.append(table)

    def save(self, folder: Path) -> list[Path]:
        """Write `NAME.json`, and `NAME.png` where matplotlib is installed; returns what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        body = {
            "benchmark": self.name,
            "about": self.about,
            "tables": [asdict(table) for table in self.tables],
            "notes": self.notes,
        }
        written = [folder / f"{self.name}.json"]
        written[0].write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if self.chart is not None and importlib.util.find_spec("matplotlib") is not None:
            written.append(folder / f"{self.name}.png")
            _draw(self.chart, written[-1])
        return written


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _draw(chart: Chart, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(x for points in chart.lines.values() for x, _ in points))
    by_name = isinstance(names[0], str)
    for number, (label, points) in enumerate(chart.lines.items()):
        middle = [spread.median for _, spread in points]
        error = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
        error = [[max(0.0, length) for length in side] for side in error]  # the ratio of medians may lie outside
        if by_name:
            width = 0.8 / len(chart.lines)
            at = [names.index(x) + (number + 0.5) * width - 0.4 for x, _ in points]
            axes.bar(at, middle, width, yerr=error, capsize=3, label=label)
        else:
            axes.errorbar([x for x, _ in points], middle, yerr=error, marker="o", capsize=3, label=label)
    if by_name:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
