"""A judge that is a Python function, from a file named on the command line with `--plugin`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prefopt.errors import UserError
from prefopt.losses.plugins import plugin_function


class FunctionJudge:
    """`function: rules.py:kindness`, where `kindness(prompt, answer)` gives a number, run with `--plugin rules.py`.

    The function of another file is not found: a recipe alone never imports code.
    """

    summary = ""

    def __init__(self, name: Any) -> None:
        self._name, self._function = name, plugin_function(str(name))

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        return [self._score(prompt, answer) for answer in answers]

    def _score(self, prompt: Any, answer: str) -> float:
        try:
            score = float(self._function(prompt, answer))
        except Exception as error:  # foreign code may raise anything
            raise UserError(f"judge {self._name}: {type(error).__name__}: {error}, on the answer {answer!r}") from error
        if not math.isfinite(score):
            raise UserError(f"judge {self._name}: gives {score} for the answer {answer!r}; it must give a number")
        return score
