"""f-DPO: DPO under another divergence than the reverse KL."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.errors import RecipeError
from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import divergence_slope, logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("fdpo")
@dataclass(frozen=True)
class FDPO(Loss):
    """DPO with another f-divergence (arXiv 2309.16240).

    Ties the policy to the reference by forward KL, Jensen-Shannon or alpha-divergence in place of the reverse KL.

    Formula:
        u = pi(y|x) / ref(y|x), over the whole answer; loss = L(beta (f'(u of chosen) - f'(u of rejected)))
        f'(u): forward_kl 1 - 1/u; js log(2 u / (1 + u)); alpha (1 - u^-alpha) / alpha; reverse_kl log u, which is dpo

    Derivation:
        The policy with the best reward under beta D_f(pi || ref) has r = beta f'(pi / ref) + a constant of the prompt
        wherever f' is unbounded at 0. The constant cancels in the Bradley-Terry likelihood, as in DPO.

    Published values:
        beta 0.1; alpha 0.3, 0.5, 0.7.

    Errata and departures:
        TRL's f_alpha_divergence_coef is 1 - alpha. forward_kl and alpha grow as (ref / pi)^alpha, so a chosen answer
        far below the reference takes over the step. Where they would overflow (a log-ratio of -72 / alpha in float32)
        they go on as their tangents; the authors' code gives NaN there.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1")
    divergence: str = knob("js", choices=("js", "forward_kl", "alpha", "reverse_kl"), help="what holds the policy")
    alpha: float | None = knob(None, above=0, below=1, help="for `alpha`: 0 is reverse_kl, 1 forward_kl; null: 0.5")
    needs = Needs(reference="logp")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence == "alpha" and self.alpha is None:
            object.__setattr__(self, "alpha", 0.5)
        if self.divergence != "alpha" and self.alpha is not None:
            raise RecipeError(f"loss.alpha: `fdpo` reads it with divergence: alpha alone, not with {self.divergence}.")

    def __call__(self, view: Pairs) -> LossOutput:
        ratios = view.chosen.log_ratio(), view.rejected.log_ratio()
        chosen, rejected = (divergence_slope(ratio, self.divergence, self.alpha) for ratio in ratios)
        metrics = pair_metrics(view, self.beta * chosen, self.beta * rejected)
        return LossOutput(logistic(self.beta * (chosen - rejected)), self.unit, metrics)
