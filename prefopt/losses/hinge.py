"""Hinge: the margin is pushed up to a bound and then left alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("hinge")
@dataclass(frozen=True)
class Hinge(Loss):
    """Normalised hinge of RSO (arXiv 2309.06657, hinge-norm).

    Raises the chosen answer at a constant rate until the margin reaches 1 / beta nats, then leaves the pair alone.

    Formula:
        h = a - b, the difference of log pi(y|x) - log ref(y|x), summed over tokens, of the two answers
        loss = max(0, 1 - beta h)

    Derivation:
        A support vector machine where DPO is a logistic regression: the same score beta h, the hinge in place of L.
        SLiC's hinge, with likelihoods measured from the reference and 1 / beta for the margin.

    Published values:
        beta 0.05 (the paper's gamma; as TRL's documentation has it).

    Errata and departures:
        The paper's sampling from the optimal policy is a matter of data, not of the loss. TRL's `hinge` is this loss;
        it is not SLiC-HF (slic), which reads no reference. At exactly 1 / beta the slope is 0.
    """

    beta: float = knob(0.05, above=0, help="one over the margin that is asked for", published="0.05 (RSO)")
    needs = Needs(view="pairs", reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        z = self.beta * (a - b)
        metrics = pair_metrics(view, self.beta * a, self.beta * b)
        return LossOutput(F.relu(1 - z), self.unit, {**metrics, "margin_met": (z >= 1).to(z)})
