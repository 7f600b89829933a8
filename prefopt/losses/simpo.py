"""SimPO: the mean log-likelihood is the reward, and there is no reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefopt.errors import RecipeError
from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("simpo")
@dataclass(frozen=True)
class SimPO(Loss):
    """Simple Preference Optimization (arXiv 2405.14734, eq. 6).

    Raises the chosen answer's mean log-likelihood above the rejected one's by a margin, without a reference.

    Formula:
        m(y) = log pi(y|x) / number of tokens
        loss = L(beta (m(chosen) - m(rejected)) - gamma), where L(z) = -log S(z) and gamma = beta gamma_beta_ratio

    Derivation:
        DPO's Bradley-Terry likelihood with beta m(y), by which decoding ranks answers, for the reward, and a head start
        gamma for the rejected answer. The loss is log 2 at m(chosen) - m(rejected) = gamma / beta.

    Published values:
        beta, gamma_beta_ratio, lr: Mistral 7B base 2, 0.8, 3e-7, instruct 2.5, 0.1, 5e-7; Llama 3 8B base 2, 0.5, 6e-7,
        instruct 2.5, 0.55, 1e-6; Gemma 2 9B 10, 0.5, 8e-7. Batch 128, 1 epoch, cosine, warm-up 10 % (authors' code).

    Errata and departures:
        The paper writes gamma, its code the ratio, with 0.25 as default. TRL's knob is gamma, beside a beta of 0.1
        and a likelihood term that are not SimPO's. The code's sft_weight is a mixture with `sft` here.
    """

    beta: float = knob(2.0, above=0, help="scale of the reward", published="2 to 2.5, 10 (Gemma 2)")
    gamma_beta_ratio: float | None = knob(None, at_least=0, help="margin, in nats a token; null: 0.5, or gamma / beta")
    gamma: float | None = knob(None, at_least=0, help="beta times the ratio, in place of it", published="0.3 to 1.6")
    needs = Needs(view="pairs")

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio, gamma = self.gamma_beta_ratio, self.gamma
        if ratio is None and gamma is None:
            object.__setattr__(self, "gamma_beta_ratio", 0.5)
        if ratio is not None and gamma is not None and not math.isclose(gamma, ratio * self.beta, rel_tol=1e-6):
            raise RecipeError(f"loss.gamma: {gamma:g} is not beta times gamma_beta_ratio ({ratio:g}). Write one.")

    def __call__(self, view: Pairs) -> LossOutput:
        chosen, rejected = view.chosen.mean("logp"), view.rejected.mean("logp")
        margin = (self.gamma_beta_ratio or 0.0) if self.gamma is None else self.gamma / self.beta
        metrics = pair_metrics(view, self.beta * chosen, self.beta * rejected)
        return LossOutput(logistic(self.beta * (chosen - rejected - margin)), self.unit, metrics)
