"""DMPO: DPO on whole trajectories, later turns weighing less."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import discounted_turns, logistic, pair_metrics, turn_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("dmpo")
@dataclass(frozen=True)
class DMPO(Loss):
    """Direct Multi-turn Preference Optimization (arXiv 2406.14868).

    Compares whole conversations, the assistant's later turns weighing less, at a rate that depends on their number.

    Formula:
        d(t) = log pi - log ref, summed over the tokens of turn t = 0 .. T - 1 of the assistant; T is each side's own
        loss = -log S(beta (sum of w(t, T_w) d_w(t) - sum of w(t, T_l) d_l(t)))
        occupancy: w(t, T) = gamma^t (1 - gamma^(T - t)) / (1 - gamma^T)
        phi: w(t, T) = (1 - gamma^(T - t)) / (1 - gamma^T); both are (T - t) / T at gamma 1

    Derivation:
        With the discounted occupancy of states and turns in the place of an answer the normaliser does not depend on
        the state; dividing by that of the trajectory's own length lets it cancel between lengths.

    Published values:
        lr 1e-6, batch 32, 3 epochs (authors' code). The paper searched beta in 0.1 to 0.9 and gamma in 0.1 to 0.99:
        small for noisy losing trajectories, large for clean ones.

    Errata and departures:
        The paper prints phi and its authors' code has occupancy, which follows from their eq. 14 and 15. Only that one
        is the first turn's dpo at gamma 0, as their corollary says; phi is then eto. In their code a turn's end marker
        keeps weight 1; here it weighs what its turn does. logps/*, logratios/* and turn_margins/* are not weighted.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (authors' code)")
    gamma: float = knob(0.7, at_least=0, at_most=1, help="discount from turn to turn", published="0.7 (authors' code)")
    turn_weight: str = knob("occupancy", choices=("occupancy", "phi"), help="weight of a turn", published="see errata")
    needs = Needs(view="pairs", reference="logp", turns=True)

    def __call__(self, view: Pairs) -> LossOutput:
        chosen, rejected = (discounted_turns(s, self.gamma, self.turn_weight) for s in (view.chosen, view.rejected))
        a, b = chosen.log_ratio(), rejected.log_ratio()
        metrics = pair_metrics(view, self.beta * a, self.beta * b) | turn_metrics(view.chosen, view.rejected)
        return LossOutput(logistic(self.beta * (a - b)), self.unit, metrics)
