"""Segment-level DPO: the turns that mattered, inside one logistic function."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import in_segment, logistic, pair_metrics, turn_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("segment_dpo")
@dataclass(frozen=True)
class SegmentDPO(Loss):
    """Segment-level Direct Preference Optimization, the authors' SDPO (arXiv 2501.01821).

    DPO on the few turns of a conversation that decided it: their log-ratios are summed before they are compared.

    Formula:
        d(t) = log pi(y_t | h_t) - log ref(y_t | h_t), summed over the tokens of the assistant's turn t; h_t is all that
        was said before it, in its own conversation, the partner's turns included
        loss = -log S(beta (sum of d(t) over the chosen segment - sum over the rejected one))

    Derivation:
        DPO's, with the occupancy of states and turns in the place of an answer. Between segments of equally many turns
        the normalisers cancel. A segment of one turn is dpo, of all turns eto.

    Published values:
        AdamW, lr 1e-6 (Llama-3.1-8B) or 5e-7 (Mistral), cosine, no warm-up, batch 32, 4096 tokens, 2 epochs.

    Errata and departures:
        The printed sum has k + 1 terms where k is called the number of rounds; as in the authors' code there is one for
        each turn of the segment, and each has weight 1. The tables count the messages of both speakers: length 3 is two
        turns of the assistant. Unequal segments made their training collapse, so such rows are refused unless
        `allow_unequal_segments` is set. `turn_weights` are ours. logps/* and logratios/* are over all turns.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (paper)")
    needs = Needs(view="pairs", reference="logp", turns=True, optional_columns=("segments", "turn_weights"))

    def __call__(self, view: Pairs) -> LossOutput:
        chosen, rejected = in_segment(view.chosen), in_segment(view.rejected)
        a, b = chosen.log_ratio(), rejected.log_ratio()
        metrics = pair_metrics(view, self.beta * a, self.beta * b) | turn_metrics(chosen, rejected)
        return LossOutput(logistic(self.beta * (a - b)), self.unit, metrics)
