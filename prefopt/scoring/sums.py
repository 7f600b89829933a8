"""The forward pass over the vocabulary: what is known of each token when all tiles have been seen.

A sum over e^z is kept beside the largest logit so far, the peak, as a sum over e^(z - peak), and rescaled when the peak
moves. With `P` that sum over the policy's logits z and `Q` the one over the reference's logits r:

    log-sum-exp = peak + log P            entropy = log P - sum e^(z - peak) (z - peak) / P
    d = (peak_q - peak_p) + (log Q - log P)
    KL(q || p) = E_q[r - z] - d           KL(p || q) = d - E_p[r - z]

Gaps r - z are summed, and peaks subtracted from peaks, so that logits that are large and close lose no digits; for
equal models both divergences are 0 to the last bit. Elsewhere rounding may leave one a little below 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.scoring.tiles import TiledLogits, in_tile, slices, tiles


@dataclass(frozen=True)
class Totals:
    """What one pass finds, `[M]` each, in nats; `lse` is the log-sum-exp. None where it was not asked for."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_lse: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None


def sweep(policy: TiledLogits, targets: Tensor, *, with_entropy: bool = False) -> Totals:
    """One pass over the tiles of one model."""
    ours = RunningSums(policy, targets, with_entropy)
    row_step, column_tiles = tiles(policy)
    for columns in column_tiles:
        operands = policy.operands(columns)
        for rows in slices(len(targets), row_step):
            ours.add_(policy.logits(rows, operands), rows, columns)
    return Totals(ours.logp, ours.lse, ours.entropy)


def sweep_both(policy: TiledLogits, targets: Tensor, reference: TiledLogits, statistics: Collection[str]) -> Totals:
    """One pass over the tiles of two models; `statistics` may name `entropy`, `forward_kl` and `reverse_kl`."""
    ours, theirs = RunningSums(policy, targets, "entropy" in statistics), RunningSums(reference, targets)
    under_reference = _MeanGap(theirs) if "forward_kl" in statistics else None
    under_policy = _MeanGap(ours) if "reverse_kl" in statistics else None
    row_step, column_tiles = tiles(policy, reference)
    for columns in column_tiles:
        operands, ref_operands = policy.operands(columns), reference.operands(columns)
        for rows in slices(len(targets), row_step):
            z, r = policy.logits(rows, operands), reference.logits(rows, ref_operands)
            gap = r - z
            for sums, tile, mean in ((ours, z, under_policy), (theirs, r, under_reference)):
                weights, shrink = sums.add_(tile, rows, columns)
                if mean is not None:
                    mean.add_(weights, gap, shrink, rows)
    apart = (theirs.peak - ours.peak) + (theirs.mass.log() - ours.mass.log())
    return Totals(
        ours.logp,
        ours.lse,
        ours.entropy,
        theirs.logp,
        theirs.lse,
        None if under_reference is None else under_reference.value - apart,
        None if under_policy is None else apart - under_policy.value,
    )


class RunningSums:
    """Running sums of one model at `M` tokens."""

    def __init__(self, model: TiledLogits, targets: Tensor, with_entropy: bool = False) -> None:
        self.targets = targets
        # Below every logit, and far enough from the end of the format for differences to be finite.
        lowest = torch.finfo(model.dtype).min / 2
        self.peak = model.hidden.new_full(targets.shape, lowest, dtype=model.dtype)
        self.mass = torch.zeros_like(self.peak)
        self.target_logit = torch.full_like(self.peak, torch.nan)
        self.centred = torch.zeros_like(self.peak) if with_entropy else None

    def add_(self, z: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Add a tile of logits, which is overwritten.

        Returns the weights e^(z - peak) of its entries `[rows, columns]`, and the factor by which earlier sums shrank.
        """
        index, inside = in_tile(self.targets[rows], columns)
        self.target_logit[rows] = torch.where(inside, z.gather(1, index).squeeze(1), self.target_logit[rows])
        before = self.peak[rows]
        peak = torch.maximum(before, z.amax(1))
        rise = before - peak
        shrink = rise.exp()
        z.sub_(peak.unsqueeze(1))
        weights = z.exp_() if self.centred is None else z.exp()
        if self.centred is not None:
            earlier = (self.centred[rows] + self.mass[rows] * rise) * shrink
            self.centred[rows] = earlier + z.mul_(weights).sum(1)
        self.mass[rows] = self.mass[rows] * shrink + weights.sum(1)
        self.peak[rows] = peak
        return weights, shrink

    @property
    def logp(self) -> Tensor:
        return (self.target_logit - self.peak) - self.mass.log()

    @property
    def lse(self) -> Tensor:
        return self.peak + self.mass.log()

    @property
    def entropy(self) -> Tensor | None:
        return None if self.centred is None else self.mass.log() - self.centred / self.mass


class _MeanGap:
    """The mean of the gap between two models' logits under one of them, whose `sums` run beside it."""

    def __init__(self, sums: RunningSums) -> None:
        self.sums = sums
        self.total = torch.zeros_like(sums.mass)

    def add_(self, weights: Tensor, gap: Tensor, shrink: Tensor, rows: slice) -> None:
        """Add a tile; `weights` are overwritten."""
        self.total[rows] = self.total[rows] * shrink + weights.mul_(gap).sum(1)

    @property
    def value(self) -> Tensor:
        return self.total / self.sums.mass
