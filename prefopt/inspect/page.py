"""A row as one self-contained HTML page."""

from __future__ import annotations

from importlib.resources import files

from prefopt.inspect.rows import RowView, Stretch
from prefopt.inspect.terminal import STRONG, TITLES

LARGEST = 0.6  # opacity of the strongest colour, on which small figures must be read


def page_of(view: RowView, title: str) -> str:
    """The page: the prompt, and for each answer its tokens (with what the models say of each) and a table of turns."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shade": _shade, "kind": _kind}
    template = environment.from_string((files("prefopt.inspect") / "page.html").read_text(encoding="utf-8"))
    shown = [name for name in TITLES if name in view.numbers]
    return template.render(view=view, title=title, titles=TITLES, shown=shown, strong=_strong(view))


def _strong(view: RowView) -> float:
    """The log-ratio that has the full colour: the row's largest, where none is strong, so that a short run shows."""
    tokens = [token for stretches in view.answers.values() for stretch in stretches for token in stretch.tokens]
    largest = max((abs(token.numbers["after"]) for token in tokens if "after" in token.numbers), default=0.0)
    return min(largest, STRONG) or STRONG


def _kind(stretch: Stretch) -> str:
    """The class of a stretch: read, outside the segment, or counted."""
    return "read" if stretch.turn is None else "counted" if stretch.counts else "outside"


def _shade(ratio: float, strong: float) -> str:
    """The colour of a log-ratio: green where the token became likelier, red where less likely."""
    opacity = LARGEST * min(abs(ratio) / strong, 1.0)
    return f"rgba({'46,160,67' if ratio >= 0 else '218,54,51'},{opacity:.2f})"
