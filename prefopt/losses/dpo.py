"""DPO: the logistic loss of the log-ratio margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import logistic, pair_metrics, preference_problem, soft_logistic
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("dpo")
@dataclass(frozen=True)
class DPO(Loss):
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7).

    Raises the chosen answer against the rejected one, measured from the reference, until the margin says who wins.

    Formula:
        a, b = log pi(y|x) - log ref(y|x), summed over the tokens of the chosen and the rejected answer
        loss = -log S(beta (a - b)); with a column `preference` p, p L(beta (a - b)) + (1 - p) L(-beta (a - b)),
        where L(z) = -log S(z) and p is the probability, in [0, 1], that the chosen answer wins

    Derivation:
        The policy with the best reward r - beta KL(pi || ref) is ref exp(r / beta) / Z(x). Solved for the reward,
        r = beta log(pi / ref) + beta log Z(x). In the Bradley-Terry model P(chosen wins) = S(r_w - r_l) the term with
        Z(x) cancels, so the likelihood of the labels is a function of the policy alone; the loss is its -log.

    Published values:
        RMSprop, lr 1e-6 (paper; the authors' code has 5e-7), 150 steps of warm-up, batch 64, 1 epoch.
        At 7-9B on UltraFeedback lr 5e-7, cosine, warm-up 10 % (alignment-handbook).

    Errata and departures:
        beta is the strength of the KL: a larger beta stays closer to the reference. On labels that never contradict
        each other the margin grows without end at any beta. Soft labels are the same likelihood, not in the paper.
    """

    beta: float = knob(
        0.1, above=0, help="strength of the pull to the reference", published="0.1 (paper), 0.5 (TL;DR), 0.01 (at 7-9B)"
    )
    needs = Needs(view="pairs", reference="logp", optional_columns=("preference",))

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        z = self.beta * (a - b)
        preference = view.columns.get("preference")
        loss = logistic(z) if preference is None else soft_logistic(z, preference.to(z))
        return LossOutput(loss, self.unit, pair_metrics(view, self.beta * a, self.beta * b))

    def row_problem(self, columns: Mapping[str, float]) -> str:
        return preference_problem(columns)
