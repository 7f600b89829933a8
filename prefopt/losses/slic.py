"""SLiC-HF: a hinge on the likelihoods themselves, and the likelihood of a target."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import pair_metrics
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("slic")
@dataclass(frozen=True)
class SLiC(Loss):
    """Sequence likelihood calibration with human feedback (arXiv 2305.10425, eq. 4).

    Ranks the chosen answer above the rejected one by a margin, and keeps its likelihood up in place of a reference.

    Formula:
        lp(y) = log pi(y|x), summed over tokens
        loss = max(0, delta - lp(chosen) + lp(rejected)) - target_weight lp(target)
        the target is the column `target`, an answer to the row's prompt; an answer to another prompt (`targets:`); or,
        where there is none, the chosen answer

    Derivation:
        A hinge calibrates the order of likelihoods. Alone it may lower both, so the cross-entropy of a target stands in
        for a KL to the supervised model, without a second model in memory.

    Published values:
        delta 1, target_weight 0.1 (HALOs); SimPO's sweep: delta 0.1 to 2, target_weight 0.1 to 10. lr 1e-5 (T5).

    Errata and departures:
        The paper's target is the supervised data's answer or the best of several samples; on preference data everyone
        takes the chosen answer. Summed, 0.1 is a strong weight on 200 tokens; per token 0.5 to 1 is usual. The target
        keeps pushing once the margin is met. TRL's `hinge` is another loss (hinge).
    """

    delta: float = knob(1.0, at_least=0, help="margin between the log-likelihoods, nats", published="1 (paper)")
    target_weight: float = knob(0.1, at_least=0, help="weight of the target's likelihood", published="0.1 (HALOs)")
    target_length: str = knob("sum", choices=("sum", "mean"), help="the target's log-likelihood, or that per token")
    needs = Needs(view="pairs", optional_columns=("target",))

    def __call__(self, view: Pairs) -> LossOutput:
        chosen, rejected = view.chosen.total("logp"), view.rejected.total("logp")
        aim = view.chosen if view.target is None else view.target
        target = aim.total("logp") if self.target_length == "sum" else aim.mean("logp")
        loss = F.relu(self.delta - (chosen - rejected)) - self.target_weight * target
        met = (chosen - rejected >= self.delta).to(loss)
        metrics = {**pair_metrics(view, chosen, rejected), "margin_met": met, "target_nll": -target}
        return LossOutput(loss, self.unit, metrics)
