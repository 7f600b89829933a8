"""How easy pairs are for a model without any reference: by how much it finds the chosen answer the likelier one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prefopt.data.formats import Example

LENGTHS = ("sum", "mean")


@dataclass(frozen=True)
class Gap:
    """log p(chosen) - log p(rejected) of a pair in nats: of the `sum` over each answer's tokens, and of the `mean`."""

    sum: float
    mean: float

    def of(self, length: str) -> float:
        """The one that `length` names."""
        return self.sum if length == "sum" else self.mean


def easiness(examples: Iterable[Example], gaps: Mapping[str, Gap], length: str) -> dict[str, Any]:
    """Figures of a chunk: `pairs` measured, `accuracy` (share whose chosen answer is the likelier one, by `length`; a
    tie counts as wrong), and the mean `gap` (nats a pair) and `gap_per_token`; None without a measured pair."""
    known = [gaps[example.example_id] for example in examples if example.example_id in gaps]
    if not known:
        return {"pairs": 0, "accuracy": None, "gap": None, "gap_per_token": None}
    return {
        "pairs": len(known),
        "accuracy": fmean(gap.of(length) > 0 for gap in known),
        "gap": fmean(gap.sum for gap in known),
        "gap_per_token": fmean(gap.mean for gap in known),
    }
