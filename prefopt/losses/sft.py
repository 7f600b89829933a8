"""SFT: likelihood of the desirable answers, alone or as a term beside a preference loss."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import token_nll
from prefopt.losses.registry import register
from prefopt.losses.views import Completions


@register("sft")
@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning (arXiv 2203.02155, the supervised step).

    Raises the likelihood of every token of the chosen or desirable answers; the others are not even scored.

    Formula:
        loss of a token = -log pi(y_t | x, y_<t), averaged over all scored tokens of the step

    Derivation:
        Maximum likelihood: up to a constant, KL(data || pi) over the answers that were wanted.

    Published values:
        As a term beside dpo: weight 1 (arXiv 2404.19733), or 0.005 with beta 0.01 (arXiv 2405.16436).

    Errata and departures:
        The mean runs over tokens of the whole step, not of a micro-batch, so no split changes it. Long answers weigh
        more; arXiv 2404.19733 divides by each answer's own length instead. Prompt tokens are never scored.
    """

    needs = Needs(view="completions", completions="desirable")
    unit = "token"

    def __call__(self, view: Completions) -> LossOutput:
        nll = token_nll(view.scores)
        return LossOutput(nll, self.unit, {"nll_loss": nll})
