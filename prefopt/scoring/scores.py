"""Per-token scores of the completions in a micro-batch: what every loss reads.

Letters: `M` scored tokens, `size` completions. Token `m` belongs to completion `sequence[m]`; tokens of one
completion are contiguous and completions are in order, so a side of a pair is a slice and never a search.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("logp", "ref_logp", "forward_kl", "reverse_kl", "entropy")

OF_TURNS = ("turn", "segment")
"""What is known of each token before any model reads it."""


class MissingStatistic(AttributeError):
    """A loss read a statistic that its `needs` do not declare, so it was never computed."""


class TokenScores:
    """Scores of `M` tokens that belong to `size` completions (some may score nothing; `M` may be 0).

    `logp`, `ref_logp` are log-probabilities in nats, `forward_kl` is KL(reference || policy) of the whole next-token
    distribution, `entropy` the policy's; each is `[M]`. `token_weight` `[M]` scales a token in every sum, 1 when
    absent. `turn` `[M]` int64 counts the assistant turns of a completion from 0, and `segment` `[M]` is the weight of a
    token's turn in the row's segment, 0 outside it; neither changes a sum unless a loss takes it as a weight. A
    statistic that was not asked for is absent, and reading it raises `MissingStatistic` with its name.
    """

    def __init__(
        self,
        size: int,
        sequence: Tensor,
        logp: Tensor,
        ref_logp: Tensor | None = None,
        forward_kl: Tensor | None = None,
        entropy: Tensor | None = None,
        token_weight: Tensor | None = None,
        reverse_kl: Tensor | None = None,
        turn: Tensor | None = None,
        segment: Tensor | None = None,
    ) -> None:
        self.size = size
        self.sequence = sequence
        self.token_weight = token_weight
        given = {
            "logp": logp,
            "ref_logp": ref_logp,
            "forward_kl": forward_kl,
            "reverse_kl": reverse_kl,
            "entropy": entropy,
            "turn": turn,
            "segment": segment,
        }
        self.statistics = {name: value for name, value in given.items() if value is not None}
        for name, value in {**self.statistics, "token_weight": token_weight}.items():
            if value is not None and value.shape != sequence.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the token list {tuple(sequence.shape)}")

    def __getattr__(self, name: str) -> Tensor:
        # Only reached when ordinary lookup failed; guards against recursion while unpickling or copying.
        statistics: dict[str, Tensor] = self.__dict__.get("statistics", {})
        if name in statistics:
            return statistics[name]
        if name in STATISTICS:
            raise MissingStatistic(f"`{name}` was read but not computed: declare it in the loss's `needs`", name=name)
        if name in OF_TURNS:
            raise MissingStatistic(f"`{name}` was read but not given: say turns=True in the loss's `needs`", name=name)
        raise AttributeError(f"TokenScores has no attribute {name!r}")

    def total(self, name: str) -> Tensor:
        """Weighted sum of a statistic over each completion: `[size]`."""
        values = getattr(self, name)
        return self._sum(values if self.token_weight is None else values * self.token_weight)

    def mean(self, name: str) -> Tensor:
        """`total` over the sum of the token weights: `[size]`; 0 for a completion that scores nothing."""
        values = getattr(self, name)
        weights = torch.ones_like(values) if self.token_weight is None else self.token_weight.to(values)
        mass = self._sum(weights)
        return self.total(name) / torch.where(mass == 0, torch.ones_like(mass), mass)

    @property
    def lengths(self) -> Tensor:
        """Number of scored tokens of each completion: `[size]` int64."""
        ones = torch.ones_like(self.sequence)
        return ones.new_zeros(self.size).index_add(0, self.sequence, ones)  # bincount would sync a GPU

    def log_ratio(self) -> Tensor:
        """log pi(y|x) - log ref(y|x), summed over each completion: `[size]`, nats."""
        # Token by token: the two sums are thousands of nats on long answers, and their difference a few.
        difference = self.logp - self.ref_logp
        return self._sum(difference if self.token_weight is None else difference * self.token_weight)

    def weighted(self, weight: Tensor) -> TokenScores:
        """The same tokens, each counting `weight` `[M]` times as much in every sum."""
        total = weight if self.token_weight is None else self.token_weight * weight
        return TokenScores(self.size, self.sequence, token_weight=total, **self.statistics)

    def slice(self, completions: slice, tokens: slice) -> TokenScores:
        """The completions `completions`, whose tokens are `tokens`, renumbered from 0. Both slices have bounds."""
        cut = {name: value[tokens] for name, value in self.statistics.items()}
        weight = None if self.token_weight is None else self.token_weight[tokens]
        sequence = self.sequence[tokens] - completions.start
        return TokenScores(completions.stop - completions.start, sequence, token_weight=weight, **cut)

    def only(self, statistics: tuple[str, ...]) -> TokenScores:
        """The same tokens with `logp` and the named statistics alone, so that an undeclared read raises."""
        kept = {name: value for name, value in self.statistics.items() if name == "logp" or name in statistics}
        return TokenScores(self.size, self.sequence, token_weight=self.token_weight, **kept)

    def _sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.size).index_add(0, self.sequence, values)
