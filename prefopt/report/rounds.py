"""The rounds of a run side by side: in its `results.json`, in its model card, as a plot and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.report.card import CARD_FILE
from prefopt.report.plots import FOLDER, Panel, save_page
from prefopt.report.results import RESULTS_FILE, plain, write_whole

PLOT = "rounds.png"
HEADING = "## Rounds"

Rows = Sequence[Mapping[str, Any]]


def write_rounds(folder: Path, rows: Rows, columns: Mapping[str, str], panels: Sequence[Panel], note: str) -> str:
    """Add the rounds to the report that a run's last training left in `folder`; returns the table.

    A row holds the figures of one model, its `round` among them; `columns` are those of the table, with their heads.
    `note` explains them in the card.
    """
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    write_whole(folder / RESULTS_FILE, json.dumps(plain({**results, "rounds": rows}), indent=2, sort_keys=True) + "\n")
    events = [{**row, "step": row["round"]} for row in rows]
    drawn = save_page(folder / FOLDER / PLOT, panels, events, "round")
    table = _table(rows, columns)
    image = [f"![rounds]({FOLDER}/{PLOT})"] if drawn else []
    section = "\n\n".join([HEADING, note, _markdown(table), *image])
    card = folder / CARD_FILE
    write_whole(card, _with_section(card.read_text(encoding="utf-8"), section))
    return "\n".join(_aligned(table))


def _table(rows: Rows, columns: Mapping[str, str]) -> list[list[str]]:
    """Heads and cells of the columns that any row has."""
    shown = {name: head for name, head in columns.items() if any(name in row for row in rows)}
    return [list(shown.values()), *([_cell(row.get(name)) for name in shown] for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *lines = table
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---:"] * len(head), *lines))


def _with_section(card: str, section: str) -> str:
    """The card with the section before its curves or data, in the place of an older one."""
    before, heading, after = card.partition(f"{HEADING}\n")
    if heading:
        card = before + after[after.index("\n## ") + 1 :]
    places = [card.index(f"\n## {name}\n") for name in ("Curves", "Data", "How to use") if f"\n## {name}\n" in card]
    place = min(places, default=len(card))
    return f"{card[:place]}\n{section}\n{card[place:]}"
