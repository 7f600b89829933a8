"""TDPO2: TDPO1 that holds back the rejected answer's divergence alone."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import divergence_metrics, logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("tdpo2")
@dataclass(frozen=True)
class TDPO2(Loss):
    """Token-level Direct Preference Optimization, second form (arXiv 2404.11999, eq. 17).

    DPO that keeps the rejected answer's next-token distributions near the reference; its authors recommend it.

    Formula:
        a, b, K_w, K_l as in tdpo1; sg stops the gradient and keeps the value
        loss = -log S(beta ((a - b) - alpha (K_l - sg(K_w)))); rewards are beta (a + K_w) and beta (b + K_l)

    Derivation:
        tdpo1 is drawn to raise K_w. With its gradient stopped the chosen answer moves as in DPO, and alpha sets how
        firmly the rejected one is held. alpha 0 is DPO; alpha 1 has the value of tdpo1, not its gradient.

    Published values:
        RMSprop, lr 5e-6, 150 steps of warm-up, batch 64, clipping at 10, 512 tokens (authors' repository).

    Errata and departures:
        At the same beta it stays much nearer to the reference than DPO: compare at equal divergence. Rewards have no
        alpha, as in the authors' code, so accuracies are not those of the loss; its argument is logged beside them.
        seqkl/margin is K_l - K_w, as in the loss; the authors log the opposite. Their README's command for this loss
        trains tdpo1 (`if_tdpo2: false` in their configuration).
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (authors' code)")
    alpha: float = knob(
        0.5, at_least=0, help="weight of the divergences", published="0.5 (authors' code), 1 to 5 (IMDb)"
    )
    needs = Needs(view="pairs", reference="distribution", statistics=("forward_kl",))

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        chosen_kl, rejected_kl = view.chosen.total("forward_kl"), view.rejected.total("forward_kl")
        z = self.beta * ((a - b) - self.alpha * (rejected_kl - chosen_kl.detach()))
        metrics = pair_metrics(view, self.beta * (a + chosen_kl), self.beta * (b + rejected_kl))
        return LossOutput(logistic(z), self.unit, metrics | divergence_metrics(view) | {"loss_argument": z})
