"""rDPO: DPO whose expectation over flipped labels is DPO on the clean ones."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import logistic, pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("rdpo")
@dataclass(frozen=True)
class RDPO(Loss):
    """Robust DPO (arXiv 2403.00409).

    Corrects for labels that were flipped at a known rate, so that on average the clean labels are learnt.

    Formula:
        h = a - b, the difference of log pi(y|x) - log ref(y|x), summed over tokens, of the two answers
        loss = [(1 - e) L(beta h) - e L(-beta h)] / (1 - 2e) = L(beta h) - e / (1 - 2e) beta h,
        where L(z) = -log S(z) and e = label_smoothing, the rate of flips

    Derivation:
        Ask for a loss whose mean over flips is DPO's, (1 - e) loss(h) + e loss(-h) = L(beta h), at h and at -h; two
        linear equations. The second form follows with L(-z) = L(z) + z.

    Published values:
        e 0.1; on IMDb with GPT-2 large beta 0.1, lr 1e-3, batch 16 (as TRL reads the paper's appendix).

    Errata and departures:
        Not bounded below: every pair keeps the extra push beta e / (1 - 2e), so the value goes negative in a normal
        run, and clean labels are overshot. Judge a run by accuracy on clean pairs. TRL only warns from e = 0.5 on.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1 (IMDb)")
    label_smoothing: float = knob(
        0.1, at_least=0, below=0.5, help="rate at which labels were flipped", published="0.1 (paper)"
    )
    needs = Needs(view="pairs", reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        z = self.beta * (a - b)
        loss = logistic(z) - self.label_smoothing / (1 - 2 * self.label_smoothing) * z
        return LossOutput(loss, self.unit, pair_metrics(view, self.beta * a, self.beta * b))

    def notes(self) -> tuple[str, ...]:
        return ("rdpo: the loss is not bounded below and may go negative; do not stop, or choose a checkpoint, by it",)
