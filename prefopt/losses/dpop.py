"""DPOP: DPO that does not let the chosen answer fall below the reference for free."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("dpop")
@dataclass(frozen=True)
class DPOP(Loss):
    """DPO-Positive (arXiv 2402.13228).

    Widens the margin as DPO does, but charges for a chosen answer that became less likely than under the reference.

    Formula:
        a, b = log pi(y|x) - log ref(y|x), summed over tokens, of the chosen and the rejected answer
        loss = L(beta (a - b - penalty max(0, -a))), where L(z) = -log S(z)

    Derivation:
        DPO sees the margin alone, so on answers that differ in a few tokens both may fall together. Below the
        reference the argument is beta ((1 + penalty) a - b): the chosen answer weighs 1 + penalty times the other.

    Published values:
        beta 0.3, penalty 50, LoRA (paper); penalties of 5 to 500 are reported to do alike.

    Errata and departures:
        The penalty stands inside the sigmoid. The default is 5: at 50 and beta 0.3 one nat below the reference moves
        the argument by 15, and margins hardly grow. Every pair starts at a = 0, the kink; its slope there is DPO's.
        `rewards/*` are DPO's, without the penalty.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.3 (paper)")
    penalty: float = knob(5.0, at_least=0, help="the paper's lambda; 0 is dpo", published="50 (paper)")
    needs = Needs(view="pairs", reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        loss = logistic(self.beta * (a - b - self.penalty * F.relu(-a)))
        metrics = pair_metrics(view, self.beta * a, self.beta * b)
        return LossOutput(loss, self.unit, {**metrics, "chosen_below_reference": (a < 0).to(a)})

    def notes(self) -> tuple[str, ...]:
        return ("dpop: penalty is 5, the paper has 50 (with beta 0.3)",) if self.penalty == 5 else ()
