"""TDPO1: DPO with the divergence of whole next-token distributions in the margin."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import divergence_metrics, logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("tdpo1")
@dataclass(frozen=True)
class TDPO1(Loss):
    """Token-level Direct Preference Optimization, first form (arXiv 2404.11999, eq. 15).

    DPO that counts how far the policy has left the reference at each token; it closes the gap between the two answers.

    Formula:
        a, b = log pi(y|x) - log ref(y|x), summed over the tokens of the chosen and the rejected answer
        K_w, K_l = SeqKL: the sum over the same tokens of KL(ref || pi) of the whole next-token distributions
        loss = -log S(beta ((a - b) - (K_l - K_w))); rewards are beta (a + K_w) and beta (b + K_l)

    Derivation:
        Token by token, the policy with the best advantage less beta KL is ref exp(Q / beta) / Z. Solved for Q, the
        sum of advantages over an answer is beta (log-ratio + SeqKL), up to a constant of the prompt that cancels.

    Published values:
        RMSprop, lr 5e-6, 150 steps of warm-up, batch 64, clipping at 10, 512 tokens (authors' repository).

    Errata and departures:
        The loss falls when K_w rises, so the policy is drawn away from the reference on chosen answers: the reason
        for tdpo2. The authors' code has 0 times infinity where a reference probability underflows; here that is 0.
        seqkl/margin is K_l - K_w, as in the loss; the authors log the opposite.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (authors' code)")
    needs = Needs(view="pairs", reference="distribution", statistics=("forward_kl",))

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        chosen_kl, rejected_kl = view.chosen.total("forward_kl"), view.rejected.total("forward_kl")
        z = self.beta * ((a - b) - (rejected_kl - chosen_kl))
        metrics = pair_metrics(view, self.beta * (a + chosen_kl), self.beta * (b + rejected_kl))
        return LossOutput(logistic(z), self.unit, metrics | divergence_metrics(view) | {"loss_argument": z})
