"""KTO: single answers, each good or bad."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import answer_metrics, balance_notes
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Completions


@register("kto")
@dataclass(frozen=True)
class KTO(Loss):
    """Kahneman-Tversky Optimization (arXiv 2402.01306, eq. 7 and 8).

    Learns from answers that are each marked good or bad, without pairs; a gain counts less the larger it is already.

    Formula:
        r = log pi(y|x) - log ref(y|x), summed; z0 = max(0, mean of r over mismatched answers of the whole step)
        loss = desirable_weight S(beta (z0 - r)) for a good answer, undesirable_weight S(beta (r - z0)) for a bad one

    Derivation:
        Prospect theory: outcomes count against a reference point, less the further away; here, the KL of the policy.

    Published values:
        AdamW, lr 5e-6, batch 8 to 128, clipping at 10, beta 0.05 to 0.5 by model (authors' repository).

    Errata and departures:
        One z0 for a step and all ranks; the authors and TRL take one a micro-batch. `z0: zero` is APO-zero unpaired.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (paper)")
    desirable_weight: float = knob(1.0, at_least=0, help="weight of good answers", published="1 (paper)")
    undesirable_weight: float = knob(1.0, at_least=0, help="weight of bad answers", published="1 (paper)")
    z0: str = knob("estimate", choices=("estimate", "zero"), help="the reference point", published="estimate (paper)")
    needs = Needs(view="completions", reference="logp", mismatched=True)
    unit = "completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", replace(self.needs, mismatched=self.z0 == "estimate"))

    def __call__(self, view: Completions) -> LossOutput:
        r, good = view.scores.log_ratio(), view.labels
        z0 = torch.as_tensor(view.estimates["kl"] if self.needs.mismatched else 0.0, dtype=r.dtype).to(r).clamp(min=0)
        weight = self.desirable_weight * good.to(r) + self.undesirable_weight * (~good).to(r)
        value = weight * torch.sigmoid(self.beta * torch.where(good, z0 - r, r - z0))
        return LossOutput(value, self.unit, answer_metrics(view, self.beta * r) | {"kl": z0.expand_as(r)})

    def estimates(self, view: Completions) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {"kl": (view.scores.log_ratio().sum(), torch.tensor(float(view.scores.size)))}

    def class_notes(self, good: int, bad: int) -> list[str]:
        return balance_notes(good, bad, self.desirable_weight, self.undesirable_weight)
