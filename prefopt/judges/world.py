"""Judges that are the small world itself: its true reward, or what of an answer its grammar could have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefopt.errors import UserError
from prefopt.world.grammar import grammatical_share, is_grammatical
from prefopt.world.reward import reward

FIGURES: dict[str, Callable[[str, str], float]] = {
    "reward": reward,
    "grammatical": is_grammatical,
    "sentences": grammatical_share,
}


class WorldJudge:
    """`world: reward`, in deviations of the grammar's own reviews; `grammatical`, 1 or 0; `sentences`, their share."""

    summary = ""

    def __init__(self, figure: Any) -> None:
        self._score = FIGURES[str(figure)]

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        try:
            return [float(self._score(prompt, answer)) for answer in answers]
        except (ValueError, TypeError) as error:
            raise UserError(f"judge world: {error}. It judges answers to the openings of its own `world`") from error
