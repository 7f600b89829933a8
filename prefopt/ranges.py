"""Where a number of a setting may lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Range:
    """Where a number may lie, ends included unless said otherwise; `also` holds single values allowed besides."""

    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    above_low: bool = False
    below_high: bool = False
    also: tuple[float, ...] = ()

    def problem(self, value: object) -> str | None:
        """Why `value` is refused, as the end of a sentence that starts with the field's name; None when it is fine."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"must be a number, not {value!r}"
        if self.whole and not isinstance(value, Integral):
            return f"must be a whole number, not {value!r}"
        if not _is_finite(value):
            return f"must be a finite number, not {value!r}"
        if value in self.also or self._holds(float(value)):
            return None
        return f"must be {self}, not {value!r}"

    def _holds(self, value: float) -> bool:
        over = value > self.low if self.above_low else value >= self.low
        return over and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        text = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        if self.high < math.inf:
            text += f" and below {self.high:g}" if self.below_high else f" and at most {self.high:.0f}"
        return text + "".join(f", or {value:g}" for value in self.also)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


COUNT = Range(1, whole=True)
AMOUNT = Range(0)
POSITIVE = Range(0, above_low=True)
SHARE = Range(0, 1, above_low=True)
SEED = Range(0, 2**32 - 1, whole=True)
DECAY = Range(0, 1, below_high=True)
