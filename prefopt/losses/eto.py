"""ETO's loss: DPO on whole trajectories, every turn of the assistant."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import logistic, pair_metrics, turn_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("eto")
@dataclass(frozen=True)
class ETO(Loss):
    """Exploration-based Trajectory Optimization (arXiv 2403.02502).

    DPO on conversations of several turns: every turn of the assistant counts, whatever segment the row names.

    Formula:
        a, b = log pi - log ref, summed over the tokens of all the assistant's turns, chosen and rejected
        loss = -log S(beta (a - b)); what the partner, the tools and the environment say is read and not scored

    Derivation:
        A trajectory is taken for one answer, so the loss is dpo's. What is ETO's is where the pairs come from: the
        model explores, a success is paired with a failure of the same task, and the round is repeated.

    Published values:
        3 rounds of 3 epochs, batch 32, constant rate after 10 % warm-up, 4096 tokens; the first with beta 0.1 and
        lr 1e-6, the others with beta 0.5 and lr 5e-7; the reference is the model at the start of its round.

    Errata and departures:
        One round is trained here. Nothing is divided by a length, so of two trajectories the longer one has the larger
        log-ratio, whatever it is worth. The authors cut a failure to five rounds beyond the success; the data is
        taken as it is.
    """

    beta: float = knob(
        0.1, above=0, help="strength of the pull to the reference", published="0.1 (first round), 0.5 (others)"
    )
    needs = Needs(view="pairs", reference="logp", turns=True)

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        metrics = pair_metrics(view, self.beta * a, self.beta * b) | turn_metrics(view.chosen, view.rejected)
        return LossOutput(logistic(self.beta * (a - b)), self.unit, metrics)
