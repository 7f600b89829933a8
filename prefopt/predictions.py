"""What a user's `compute_metrics` sees of an evaluation: one line of numbers per row, each row once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from prefopt.scoring import TokenScores


class Predictions:
    """Collects per-row scores on each rank, for `compute_metrics(EvalPrediction)`; idle without one.

    `predictions` is `[N,2]` for pairs (chosen, rejected) and `[N,1]` for single completions: the summed log-ratio to
    the reference, or the summed log-prob where there is no reference. `label_ids` is 1 for pairs and for desirable
    completions, 0 for the others. Rows are in the order of the data set.
    """

    def __init__(self, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None) -> None:
        self.compute_metrics = compute_metrics
        self.lines: list[tuple[int, int, list[float]]] = []

    def add(self, batch: dict[str, Any], scores: TokenScores) -> None:
        """Remember the rows of a batch."""
        if self.compute_metrics is None:
            return
        values = (scores.log_ratio() if "ref_logp" in scores.statistics else scores.total("logp")).tolist()
        count = len(batch["row"])
        for index, row in enumerate(batch["row"].tolist()):
            desirable = batch["paired"] or index < batch["desirable_size"]
            self.lines.append((row, int(desirable), values[index::count][:2]))  # a target is not shown

    def metrics(self, prefix: str) -> dict[str, float]:
        """Gather the rows of all ranks, call the user's function, and start anew; names without their `prefix`."""
        if self.compute_metrics is None:
            return {}
        lines = sorted(gather_object(self.lines))
        self.lines = []
        predictions = np.array([values for _, _, values in lines])
        labels = np.array([label for _, label, _ in lines])
        found = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        return {name.removeprefix(f"{prefix}_"): denumpify_detensorize(value) for name, value in found.items()}
