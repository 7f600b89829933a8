"""What a store keeps of an answer: one number for each token, or what a whole next-token distribution is made of.

| form | for each scored token | whole distributions | exact while |
| --- | --- | --- | --- |
| `logp` | log-probability of the token | no | always |
| `hidden` | final hidden state, in its own precision | with a frozen copy of the head | always |
| `expected` | mean row of the head, float32 | forward KL alone | the policy has the same, frozen head |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prefopt.reference.live import LiveReference
from prefopt.reference.stored import StoredAnswer, as_tensor
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.expected import expected_rows

LOGP, HIDDEN, EXPECTED = "logp", "hidden", "expected"
SMALL = 2 * 10**9
"""Bytes of whole distributions that `auto` keeps; beyond them, making them again is often cheaper than reading them."""
_SCALARS = 3  # mean logit, log-normalizer and log-probability, behind each expected row


def expected_bytes(width: int) -> int:
    """Bytes of a token's expected row for a head of this width."""
    return 4 * (width + _SCALARS)


class Gap(NamedTuple):
    """How far two computations lie apart, in a unit, and over how many tokens rounding may have summed up."""

    size: float
    unit: str
    tokens: int


class LogProbs:
    """Log-probabilities of the tokens: all that most losses read, and small enough to lie in memory."""

    kind, column, words = LOGP, "ref_logp", "log-probabilities"
    token_bytes = 4

    def numbers(self, source: LiveReference, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The numbers of the tokens of a batch, `[M]`."""
        return source.scores(policy, batch)["ref_logp"]

    def gaps(self, numbers: np.ndarray, found: np.ndarray) -> list[Gap]:
        """How far two computations lie apart: the root of the sum of squares, so that two tokens cannot cancel."""
        return [Gap(float(np.linalg.norm(numbers - found)), " nats", len(numbers))]


class WholeForm(ABC):
    """A form from which a policy's forward can make whole distributions."""

    kind: str
    words: str
    column = "reference"

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """What a scored token takes in the store."""

    @abstractmethod
    def numbers(self, source: LiveReference, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The numbers of the tokens of a batch, `[M, D]`."""

    @abstractmethod
    def given(self, numbers: Tensor | None, like: Tensor) -> Distribution | ExpectedRows:
        """What a policy's forward is told; `numbers` is None for no token. `like` says on which device."""

    def gaps(self, numbers: np.ndarray, found: StoredAnswer) -> list[Gap]:
        """How far two computations lie apart, relative to their size."""
        return [_relative(as_tensor(numbers), found.read())]


class HiddenStates(WholeForm):
    """Final hidden states. The head that makes distributions of them is copied here, apart from the wrapped model."""

    kind, words = HIDDEN, "hidden states"

    def __init__(self, head: Distribution) -> None:
        self.head = head
        self.width = head.head.shape[1]

    @property
    def token_bytes(self) -> int:
        return self.width * self.head.hidden.element_size()

    def numbers(self, source: LiveReference, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        return source.distribution(policy, batch).hidden

    def given(self, numbers: Tensor | None, like: Tensor) -> Distribution:
        head = self.head
        if head.head.device != like.device:
            head.head, head.bias = head.head.to(like.device), None if head.bias is None else head.bias.to(like.device)
        hidden = head.head.new_zeros(0, self.width) if numbers is None else numbers
        return Distribution(hidden, head.head, head.bias, head.scale, head.softcap)


class ExpectedHeadRows(WholeForm):
    """Mean rows of the head that policy and reference share: a KL without a second pass over the vocabulary.

    Rows that `narrow` products made have a kind of their own: the KL is a difference of such products and the
    policy's, so that rows from exact ones, of a CPU for instance, would put the rounding of one side into it.
    """

    words = "expected head rows"

    def __init__(self, width: int, *, narrow: bool) -> None:
        self.width = width
        self.kind = f"{EXPECTED}_narrow" if narrow else EXPECTED

    @property
    def token_bytes(self) -> int:
        return expected_bytes(self.width)

    def numbers(self, source: LiveReference, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        rows = expected_rows(source.distribution(policy, batch), batch["target"])
        scalars = torch.stack([rows.mean_logit, rows.log_normalizer, rows.ref_logp], dim=1)
        return torch.cat([rows.rows, scalars], dim=1)

    def given(self, numbers: Tensor | None, like: Tensor) -> ExpectedRows:
        if numbers is None:
            numbers = torch.zeros(0, self.width + _SCALARS, device=like.device)
        rows, scalars = numbers.split([self.width, _SCALARS], dim=1)
        return ExpectedRows(rows, *scalars.unbind(1))

    def gaps(self, numbers: np.ndarray, found: StoredAnswer) -> list[Gap]:
        """Apart for the rows and for the log-probabilities, beside which the rows are small."""
        here, there = as_tensor(numbers), found.read()
        nats = float((here[:, -1] - there[:, -1]).norm())
        return [_relative(here[:, : self.width], there[:, : self.width]), Gap(nats, " nats", len(here))]


def _relative(here: Tensor, there: Tensor) -> Gap:
    here, there = here.float(), there.float()
    return Gap(float((here - there).norm() / there.norm()), " of its own size", 1)
