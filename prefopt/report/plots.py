"""The curves of a run as PNG files: one per question, and all of them on one page for the model card.

matplotlib is an extra and is imported only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Events = Sequence[dict[str, Any]]
Points = tuple[list[float], list[float]]

FOLDER = "plots"
OVERVIEW = "overview.png"
STEP = "optimizer step"
MANY_POINTS = 50  # above this a line is hard to follow without smoothing
DPI = 150

# Okabe and Ito's colours, which people with any common colour blindness can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"


@dataclass(frozen=True)
class Curve:
    """One metric, drawn from the training events and, under `eval_`, from the evaluations."""

    metric: str
    label: str = ""  # for the legend; not needed for the only curve of a panel
    colour: str = BLUE
    noisy: bool = True  # worth smoothing
    right_axis: str = ""  # label of an axis of its own on the right


@dataclass(frozen=True)
class Panel:
    """One picture: its file name, title, label of the left axis with the unit, and its curves."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    limits: tuple[float, float] | None = None
    level: float | None = None  # a reference line, such as chance


PANELS = (
    Panel("loss", "Loss", "mean over the loss's unit", (Curve("loss"),)),
    Panel(
        "accuracy",
        "Reward accuracy",
        "share of pairs",
        (Curve("rewards/accuracies"),),
        limits=(-0.03, 1.03),
        level=0.5,
    ),
    Panel("margins", "Reward margin", r"chosen $-$ rejected ($\beta$ nats)", (Curve("rewards/margins"),), level=0),
    Panel(
        "logratios",
        "Log-ratio to the reference",
        r"$\log\,\pi / \pi_{ref}$ per completion (nats)",
        (Curve("logratios/chosen", "chosen", BLUE), Curve("logratios/rejected", "rejected", ORANGE)),
        level=0,
    ),
    Panel(
        "rewards",
        "Implicit reward",
        r"reward per completion ($\beta$ nats)",
        (Curve("rewards/chosen", "chosen", BLUE), Curve("rewards/rejected", "rejected", ORANGE)),
        level=0,
    ),
    Panel("entropy", "Entropy", "nats per scored token", (Curve("entropy", colour=GREEN),)),
    Panel(
        "optimisation",
        "Learning rate and gradient norm",
        "learning rate",
        (Curve("learning_rate", noisy=False), Curve("grad_norm", colour=ORANGE, right_axis="gradient norm")),
    ),
)


def save_plots(folder: str | Path, metrics: Events) -> list[Path]:
    """Draw the curves of a run into `folder/plots`, and an overview of them.

    `metrics` are the events of `metrics.jsonl`. Only panels with at least one figure are drawn. Returns the files,
    the overview first; nothing, and one line on the screen, when matplotlib is not installed.
    """
    panels = _panels_with_figures(metrics)
    if not panels:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print('No plots were drawn: matplotlib is missing. Get it with: pip install "prefopt[report]"')
        return []
    target = Path(folder) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    files = [_save(_overview(panels, metrics), target / OVERVIEW)]
    for panel in panels:
        figure, grid = _figure(1, 1, (6.0, 3.6))
        _draw(grid[0], panel, metrics)
        files.append(_save(figure, target / f"{panel.name}.png"))
    return files


def save_levels(
    folder: str | Path, name: str, axis: str, places: Sequence[int], curves: Mapping[str, Sequence[float | None]]
) -> Path | None:
    """Draw a picture of a few curves, each in a panel of its title, into `folder/plots/<name>.png`.

    `axis` says what `places` number. Nothing is drawn, and None returned, when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    target = Path(folder) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    figure, grid = _figure(1, len(curves), (4.6 * len(curves), 3.1))
    for axes, (title, values) in zip(grid, curves.items(), strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(axis, fontsize=9)
        _style(axes)
        axes.plot(places, [math.nan if value is None else value for value in values], "o-", color=BLUE)
    return _save(figure, target / f"{name}.png")


def save_page(path: Path, panels: Sequence[Panel], metrics: Events, x_label: str) -> bool:
    """Draw those panels that have figures on one page; `step` of an event is its place along `x_label`.

    False where there is nothing to draw, or nothing to draw with.
    """
    drawn = _with_figures(panels, metrics)
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(_overview(drawn, metrics, x_label), path)
    return True


def _with_figures(panels: Sequence[Panel], metrics: Events) -> list[Panel]:
    present = {name for event in metrics for name, value in event.items() if isinstance(value, int | float)}
    return [panel for panel in panels if any(_names(curve) & present for curve in panel.curves)]


def _panels_with_figures(metrics: Events) -> list[Panel]:
    panels = _with_figures(PANELS, metrics)
    if any(panel.name == "logratios" for panel in panels):
        panels = [panel for panel in panels if panel.name != "rewards"]  # the same curves times beta
    return panels


def _names(curve: Curve) -> set[str]:
    return {curve.metric, f"eval_{curve.metric}"}


def _overview(panels: list[Panel], metrics: Events, x_label: str = STEP) -> Figure:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = _figure(rows, columns, (4.6 * columns, 3.1 * rows))
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, metrics, x_label)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure on its own canvas: it leaves the user's matplotlib settings and open windows alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path


def _draw(axes: Axes, panel: Panel, metrics: Events, x_label: str = STEP) -> None:
    axes.set_title(panel.title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    _style(axes)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    handles: list[Any] = []
    for curve in panel.curves:
        target = _right_axis(axes, curve) if curve.right_axis else axes
        handles += _draw_curve(target, curve, metrics)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    if any(curve.right_axis for curve in panel.curves):
        axes.yaxis.label.set_color(panel.curves[0].colour)  # two axes, told apart by colour instead of a legend
    elif len(handles) > 1:
        axes.legend(handles=handles, fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", loc="best")


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(True, color="#E5E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)


def _right_axis(axes: Axes, curve: Curve) -> Axes:
    right = axes.twinx()
    _style(right)
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.spines["right"].set_color(curve.colour)
    right.set_ylabel(curve.right_axis, fontsize=9, color=curve.colour)
    return right


def _draw_curve(axes: Axes, curve: Curve, metrics: Events) -> list[Any]:
    """Training as a line (pale with a smoothed one on top when there are many points), evaluations as markers."""
    steps, values = _points(metrics, curve.metric)
    eval_steps, eval_values = _points(metrics, f"eval_{curve.metric}")
    handles: list[Any] = []
    if len(steps) > MANY_POINTS and curve.noisy:
        axes.plot(steps, values, color=curve.colour, linewidth=0.8, alpha=0.3)
        values = smooth(values, len(values) // 25)
    if steps:
        marker = "o" if len(steps) == 1 else None
        label = curve.label or "training"
        handles += axes.plot(steps, values, color=curve.colour, linewidth=1.7, marker=marker, label=label)
    if eval_steps:
        label = f"{curve.label}, evaluation" if curve.label else "evaluation"
        line = axes.plot(eval_steps, eval_values, ":D", color=curve.colour, linewidth=0.9, markersize=5, label=label)
        line[0].set(markeredgecolor="black", markeredgewidth=0.6, zorder=5)
        handles += line
    return handles


def _points(metrics: Events, name: str) -> Points:
    """Step and value of every event that has the metric, one per step: the last one written."""
    found = {event["step"]: float(event[name]) for event in metrics if isinstance(event.get(name), int | float)}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Moving average over up to `half_width` points on either side; a point that is not finite stays as it is."""
    smoothed = []
    for index, value in enumerate(values):
        near = [item for item in values[max(0, index - half_width) : index + half_width + 1] if math.isfinite(item)]
        smoothed.append(math.fsum(near) / len(near) if math.isfinite(value) else value)
    return smoothed
