"""A row on the terminal, in colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from prefopt.inspect.rows import RowView, Stretch

TITLES = {"before": "ratio before", "after": "ratio after", "kl": "KL", "logp": "logp"}
"""What the numbers of a token are, in nats; the log-ratios are to the reference, before training and after it."""
STRONG = 2.0
"""A log-ratio, in nats, that has the full colour."""


def print_row(view: RowView, console: Console | None = None) -> None:
    """The prompt, each answer with its tokens marked, and a table of its turns."""
    (console or Console()).print(Group(*_parts(view)))


def _parts(view: RowView) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(view.where, style="bold")]
    parts += [Text(f"noted: {note}", style="yellow") for note in view.notes]
    parts += [Text("\nprompt", style="bold"), _text(view.prompt)]
    for side, stretches in view.answers.items():
        parts += [Text(f"\n{side}", style="bold"), _text(stretches), _table(view, side)]
    parts += [Text(f"\n{view.margin}", style="bold")] if view.margin else []
    legend = Text("\nbold: counts in the loss   ")
    legend.append("struck: scored, outside the segment", style="strike")
    legend.append("   dim: read, not scored", style="dim")
    if "after" in view.numbers:
        legend.append("   green: likelier than under the reference, red: less likely")
    return [*parts, legend]


def _text(stretches: Sequence[Stretch]) -> Text:
    text = Text()
    for stretch in stretches:
        label = stretch.role if stretch.turn is None else f"{stretch.role}, turn {stretch.turn}"
        text.append(f"[{label}]", style="cyan")
        for token in stretch.tokens:
            text.append(token.text, style=_style(stretch, token.numbers.get("after")))
        text.append("\n")
    return text


def _style(stretch: Stretch, ratio: float | None) -> str:
    if stretch.turn is None:
        return "dim"
    if not stretch.counts:
        return "strike"
    if ratio is None:
        return "bold"
    shade = round(60 + 140 * min(abs(ratio) / STRONG, 1.0))
    return f"bold on rgb(0,{shade},0)" if ratio >= 0 else f"bold on rgb({shade},0,0)"


def _table(view: RowView, side: str) -> Table:
    shown = [name for name in TITLES if name in view.numbers]
    heads = ("turn", "tokens", "weight", *(TITLES[name] for name in shown))
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None, padding=(0, 2, 0, 0))
    turns = [stretch for stretch in view.answers[side] if stretch.turn is not None]
    for turn in turns:
        sums = (f"{turn.total(name):+.3f}" for name in shown)
        table.add_row(str(turn.turn), str(len(turn.tokens)), f"{turn.weight:g}", *sums)
    if len(turns) > 1:
        sums = (f"{view.counted(side, name):+.3f}" for name in shown)
        table.add_row("weighted sum", str(view.tokens[side]), "", *sums, style="bold")
    return table
