"""The page of a loss (`prefopt losses dpo`) and the rows of the README's table, both drawn from the class itself."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import NamedTuple

from prefopt.losses.base import Loss, Needs
from prefopt.losses.knobs import Knob, knobs_of
from prefopt.losses.registry import get, names

_HEADING = re.compile(r"^([A-Z][A-Za-z ]+):$", re.MULTILINE)
_TITLE = re.compile(r"(?P<title>.+?) \((?P<paper>.+)\)\.?")
_REFERENCE = {"none": "no reference", "logp": "reference log-probs", "distribution": "reference distribution"}


def page(name: str) -> str:
    """Everything there is to know about a loss, as text: paper, formula, derivation, knobs, needs, errata."""
    loss = get(name)
    title, paper, summary = _opening(loss)
    sections = _sections(loss)
    ordered: dict[str, str] = {key: sections.pop(key) for key in ("Formula", "Derivation") if key in sections}
    ordered["Knobs"] = _knob_table(loss)
    ordered["Needs"] = _needs_text(loss.needs, loss.unit)
    head = f"{name}: {title}\n{paper}\n\n{summary}".rstrip()
    blocks = [f"{key}\n{textwrap.indent(text, '  ')}" for key, text in (ordered | sections).items()]
    return "\n\n".join([head, *blocks]) + "\n"


class Summary(NamedTuple):
    """A loss in a line of a table; `columns` has the optional ones in brackets, `defaults` every knob."""

    name: str
    paper: str
    data: str
    reference: str
    columns: str
    defaults: str
    line: str


def table_rows() -> list[Summary]:
    """Every registered loss, in order of name."""
    rows = []
    for name in names():
        loss = get(name)
        _, paper, summary = _opening(loss)
        data, reference, *more = needs_parts(loss.needs)
        defaults = ", ".join(f"{knob.name} {_default(knob)}" for knob in knobs_of(loss))
        rows.append(Summary(name, paper, data, reference, ", ".join(more), defaults, " ".join(summary.split())))
    return rows


def needs_summary(needs: Needs) -> str:
    """The needs in a few words: "pairs, reference log-probs, [preference]"; optional columns in brackets."""
    return ", ".join(needs_parts(needs))


def needs_parts(needs: Needs) -> list[str]:
    """The needs one by one: the data, the reference, then statistics and columns, optional ones in brackets."""
    columns = [*needs.columns, *(f"[{column}]" for column in needs.optional_columns)]
    return [_data(needs), _REFERENCE[needs.reference], *needs.statistics, *columns]


def _opening(loss: type[Loss]) -> tuple[str, str, str]:
    """Title, paper and the paragraph below; the docstring's first line reads `Title (paper).`"""
    text = inspect.cleandoc(loss.__doc__ or "")
    first, _, rest = text.partition("\n")
    match = _TITLE.fullmatch(first.strip())
    title, paper = (match["title"], match["paper"]) if match else (first.strip(), "")
    return title, paper, _HEADING.split(rest)[0].strip()


def _sections(loss: type[Loss]) -> dict[str, str]:
    """The docstring's sections: a heading that ends in a colon, and the indented text below it."""
    _, *parts = _HEADING.split(inspect.cleandoc(loss.__doc__ or ""))
    bodies = [textwrap.dedent(text.strip("\n")).rstrip() for text in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True))


def _knob_table(loss: type[Loss]) -> str:
    knobs = knobs_of(loss)
    return "\n".join(_knob_line(knob) for knob in knobs) if knobs else "none"


def _knob_line(knob: Knob) -> str:
    facts = [f"default {_default(knob)}", knob.range, knob.help, knob.published and f"published: {knob.published}"]
    return f"{knob.name}: " + "; ".join(fact for fact in facts if fact)


def _default(knob: Knob) -> str:
    return "null" if knob.default is None else str(knob.default)


def _needs_text(needs: Needs, unit: str) -> str:
    lines = [
        f"data: {_data(needs)}",
        f"reference: {needs.reference}",
        f"statistics: {', '.join(('logp', *needs.statistics))}",
        f"columns: {', '.join(needs.columns) or 'none'}",
        f"optional columns: {', '.join(needs.optional_columns) or 'none'}",
        f"averaged over: {'desirable ' if needs.completions == 'desirable' else ''}{unit}s of the step",
    ]
    return "\n".join(lines)


def _data(needs: Needs) -> str:
    return "pairs" if needs.view == "pairs" else f"{needs.completions} answers, paired or single"
