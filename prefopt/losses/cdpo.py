"""cDPO: DPO for labels that are now and then wrong."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import pair_metrics, soft_logistic
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("cdpo")
@dataclass(frozen=True)
class CDPO(Loss):
    """Conservative DPO (note by E. Mitchell, https://ericmitchell.ai/cdpo.pdf, eq. 3).

    Raises the chosen answer until the margin fits a label that is wrong with a known probability, and no further.

    Formula:
        h = a - b, the difference of log pi(y|x) - log ref(y|x), summed over tokens, of the two answers
        loss = (1 - e) L(beta h) + e L(-beta h) = L(beta h) + e beta h, where L(z) = -log S(z), e = label_smoothing

    Derivation:
        The cross-entropy of S(beta h) against a label that is true with probability 1 - e; or DPO, averaged over
        flips of the label at rate e. It is smallest at h = log((1 - e) / e) / beta, where it is the entropy of e.

    Published values:
        e 0.1 is the customary start; the HALOs code has 0.2. beta and the rest as for dpo.

    Errata and departures:
        The mirror image of rdpo, which undoes flips where this one expects them: do not take one for the other. TRL's
        `sigmoid` reads no label_smoothing (1.16), so its DPO with smoothing is plain DPO; older versions meant this.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference", published="0.1, as dpo")
    label_smoothing: float = knob(
        0.1, at_least=0, below=0.5, help="share of labels taken to be wrong", published="0.1 (usual), 0.2 (HALOs)"
    )
    needs = Needs(view="pairs", reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        loss = soft_logistic(self.beta * (a - b), 1 - self.label_smoothing)
        return LossOutput(loss, self.unit, pair_metrics(view, self.beta * a, self.beta * b))
