"""What a judge is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Judge(Protocol):
    """Says how good answers are."""

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        """One finite number for each answer to `prompt` (a text or a list of messages); higher is better.

        Raises `UserError` where no judgement can be had.
        """

    @property
    def summary(self) -> str:
        """What the judging has cost so far, in a line; empty where nothing is to be said."""
