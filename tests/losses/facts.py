"""What the shared tests must be told of a loss, because nobody can derive it from the class.

Each loss says it in its own test file, `tests/losses/test_<name>.py`, as `FACTS = Facts(...)`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What is true of a loss at its defaults.

    `at_the_reference`: its value where policy and reference agree; None for a loss without a reference.
    `more_than_the_margin`: it reads more of the two answers than the difference of their log-ratios, or of their (mean)
    log-probabilities. `turns`: it draws the margin to a finite value, so that beyond it the gradient turns. `fades`:
    the gradient of a hopeless row goes to 0. `same_as`: the loss whose formula it has; what differs is the rows it is
    for, and what it logs. `per_token`: it divides by the number of tokens. `beside`: by knob, the
    other knobs without which it is not read. `columns`: a number for each of its columns that will do in any row.

    `formula`, for a loss that tests/oracle/float64.py does not have, is written from the paper in the arithmetic of
    that file, and best by someone who did not write the loss: `formula(pair, **knobs)` gives the value of a pair,
    `formula(answer, desirable, **knobs)` for a completions view a list with a value for each unit; its defaults are
    the loss's. `knobs` are further settings to compare it at. `reward(answer, **knobs)` is the reward that is logged,
    where that is not beta times the log-ratio. `no_formula` is the reason why there is none.
    """

    at_the_reference: float | None = None
    more_than_the_margin: bool = False
    turns: bool = False
    fades: bool = False
    same_as: str = ""
    per_token: bool = False
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Mapping[str, float] = field(default_factory=dict)
    formula: Callable[..., Any] | None = None
    knobs: Sequence[Mapping[str, Any]] = ()
    reward: Callable[..., Any] | None = None
    no_formula: str = ""


def facts_of(loss: str) -> Facts:
    """The facts of a loss, from its test file; `AssertionError` that says what to write where there are none."""
    module = f"tests.losses.test_{loss}"
    remedy = f"{module.replace('.', '/')}.py: write FACTS = Facts(...) there, as tests/losses/facts.py explains"
    assert importlib.util.find_spec(module) is not None, f"`{loss}` has no test file. {remedy}"
    facts = getattr(importlib.import_module(module), "FACTS", None)
    assert isinstance(facts, Facts), f"`{loss}`: the shared tests must be told of it. {remedy}"
    return facts
