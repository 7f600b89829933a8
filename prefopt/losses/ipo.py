"""IPO: regression of the log-ratio margin on a fixed target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.functional import mean_log_ratio, pair_metrics, preference_problem
from prefopt.losses.knobs import knob
from prefopt.losses.registry import register
from prefopt.losses.views import Pairs


@register("ipo")
@dataclass(frozen=True)
class IPO(Loss):
    """Identity Preference Optimization (arXiv 2310.12036, eq. 17).

    Draws the margin to 1 / (2 beta) from both sides, so it stays finite even on labels that never contradict.

    Formula:
        h = a - b, the difference of log pi(y|x) - log ref(y|x) of the two answers, per token or summed
        loss = (h - t)^2, t = 1 / (2 beta); with a column `preference` p, p (h - t)^2 + (1 - p) (h + t)^2

    Derivation:
        Maximise the probability of winning itself, not its log-odds, under the KL. The optimum has the margin
        [p(y beats mu) - p(y' beats mu)] / beta: no Bradley-Terry model. Eq. 17 is that regression with sampled labels.

    Published values:
        beta 0.1, 0.5, 1 (the paper's bandits); 0.01 to 1 in sweeps at 7-8B (SimPO); 0.1 (HALOs).

    Errata and departures:
        beta is the paper's tau. The paper writes sums; its authors told TRL their results used means, so `length` is
        mean, as elsewhere. Equal lengths n: mean is sum at beta / n, over n^2. 5 nats a token (beta 0.1) is out of
        reach of real models: `mean` with a small beta only pushes. Soft labels: the mean over flips.
    """

    beta: float = knob(
        0.1, above=0, help="the paper's tau; the margin's target is 1 / (2 beta)", published="0.1, 0.5, 1 (paper)"
    )
    length: str = knob("mean", choices=("mean", "sum"), help="log-ratios per token, or summed", published="see errata")
    needs = Needs(view="pairs", reference="logp", optional_columns=("preference",))

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        h = mean_log_ratio(view.chosen) - mean_log_ratio(view.rejected) if self.length == "mean" else a - b
        p, target = view.columns.get("preference"), 1 / (2 * self.beta)
        loss = (h - target) ** 2 if p is None else p.to(h) * (h - target) ** 2 + (1 - p.to(h)) * (h + target) ** 2
        metrics = pair_metrics(view, self.beta * a, self.beta * b)
        return LossOutput(loss, self.unit, {**metrics, "regressed_margin": h})

    def row_problem(self, columns: Mapping[str, float]) -> str:
        return preference_problem(columns)
