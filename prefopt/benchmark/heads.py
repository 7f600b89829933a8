"""The head alone: DPO, TDPO1 and TDPO2 from hidden states to gradients, as prefopt does it, densely, and at least.

All start from hidden states and heads of both models and end with the gradients of the policy's. Half of the tokens
belong to chosen answers, half to rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.benchmark.setting import device
from prefopt.scoring import score_tokens
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.expected import expected_rows
from prefopt.scoring.head import statistics_of

Statistics = dict[str, Tensor]

_BETA, _ALPHA = 0.1, 0.5
_PAIRS = 4
_FLOOR_COLUMNS = 4096


@dataclass(frozen=True)
class HeadShape:
    """`tokens` scored tokens (a multiple of 8), hidden states of `width`, and a `vocabulary`."""

    tokens: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"M {self.tokens}, H {self.width}, V {self.vocabulary}"


class HeadInputs:
    """Random hidden states and heads, the reference's near the policy's."""

    def __init__(self, shape: HeadShape) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, shape.width, generator=random)

        scale = shape.width**-0.5
        hidden, head = normal(shape.tokens), normal(shape.vocabulary) * scale
        self.ref_hidden = (hidden + 0.1 * normal(shape.tokens)).to(device())
        self.ref_head = (head + 0.1 * scale * normal(shape.vocabulary)).to(device())
        self.hidden = hidden.to(device()).requires_grad_()
        self.head = head.to(device()).requires_grad_()
        self.targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=random).to(device())
        self.ref_logp = torch.zeros(shape.tokens, device=device())  # what a cache would hold; its value costs nothing

    @cached_property
    def rows(self) -> ExpectedRows:
        """What a cache would hold of a reference that shares the policy's head."""
        return expected_rows(Distribution(self.ref_hidden, self.head.detach()), self.targets)


def _ours(inputs: HeadInputs, *statistics: str) -> Statistics:
    reference = {"ref_hidden": inputs.ref_hidden, "ref_head": inputs.ref_head} if "ref_logp" in statistics else {}
    found = score_tokens(inputs.hidden, inputs.head, inputs.targets, statistics=statistics, **reference)
    return {"ref_logp": inputs.ref_logp, **found}


def _frozen(inputs: HeadInputs, *statistics: str) -> Statistics:
    """With a head that does not train, against expected rows of it."""
    policy = Distribution(inputs.hidden, inputs.head.detach())
    rows = inputs.rows if "ref_logp" in statistics else None
    return {"ref_logp": inputs.ref_logp, **statistics_of(policy, inputs.targets, statistics, rows)}


def _dense(inputs: HeadInputs, *statistics: str) -> Statistics:
    """Whole logits of both models, as the authors of TDPO have them (arXiv 2404.11999, section 4), of scored tokens."""
    policy = F.linear(inputs.hidden, inputs.head).log_softmax(-1)
    found = {"ref_logp": inputs.ref_logp, "logp": _at(policy, inputs.targets)}
    if "ref_logp" in statistics:
        with torch.no_grad():
            reference = F.linear(inputs.ref_hidden, inputs.ref_head).log_softmax(-1)
        found["ref_logp"] = _at(reference, inputs.targets)
        found["forward_kl"] = (reference.exp() * (reference - policy)).sum(-1)
    return found


def _at(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)


def _by_answer(values: Tensor) -> Tensor:
    """Sums of the chosen and of the rejected answers: `[2, pairs]`."""
    return values.view(2, _PAIRS, -1).sum(-1)


def _dpo(found: Statistics) -> Tensor:
    a, b = _by_answer(found["logp"] - found["ref_logp"])
    return F.softplus(-_BETA * (a - b)).mean()


def _tdpo(found: Statistics, alpha: float, hold_chosen: bool) -> Tensor:
    a, b = _by_answer(found["logp"] - found["ref_logp"])
    chosen, rejected = _by_answer(found["forward_kl"])
    return F.softplus(-_BETA * (a - b - alpha * (rejected - (chosen.detach() if hold_chosen else chosen)))).mean()


def _tdpo1(found: Statistics) -> Tensor:
    return _tdpo(found, 1.0, hold_chosen=False)


def _tdpo2(found: Statistics) -> Tensor:
    return _tdpo(found, _ALPHA, hold_chosen=True)


@dataclass(frozen=True)
class HeadWay:
    """A way from hidden states to gradients: who scores, what, and for which loss; `floor` has nothing but products.

    `frozen` is prefopt's with a head that does not train, against expected rows where the loss compares distributions.
    """

    loss: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.loss}, {self.kind}"

    def step(self, inputs: HeadInputs) -> None:
        """Forward and backward; gradients are thrown away."""
        if self.kind == "floor":
            multiply(inputs, PRODUCTS[self.loss])
            return
        score = {"prefopt": _ours, "dense": _dense, "frozen": _frozen}[self.kind]
        statistics = ("logp",) if self.loss == "dpo" else ("logp", "ref_logp", "forward_kl")
        _LOSSES[self.loss](score(inputs, *statistics)).backward()
        inputs.hidden.grad = inputs.head.grad = None


_LOSSES: dict[str, Callable[[Statistics], Tensor]] = {"dpo": _dpo, "tdpo1": _tdpo1, "tdpo2": _tdpo2}

# Matrix products of `2 M H V` flops where logits are made again in the backward pass. All have the policy's logits and
# the gradients of hidden states and head. Then DPO: the policy's again. TDPO1: the reference's, twice, since no policy
# probability is left in the gradient of its sum. TDPO2: the policy's again, the reference's and half of that again.
PRODUCTS = {"dpo": 4.0, "tdpo1": 5.0, "tdpo2": 5.5}
HEAD_WAYS = tuple(HeadWay(loss, kind) for kind in ("prefopt", "dense", "frozen", "floor") for loss in _LOSSES)


def multiply(inputs: HeadInputs, products: float) -> None:
    """So many products of hidden states and head, two of them the gradients', by tiles of the vocabulary; no more."""
    with torch.no_grad():
        whole, rest = divmod(products - 2, 1)
        hidden = inputs.hidden
        part = hidden[: int(rest * len(hidden))]
        for head in inputs.head.split(_FLOOR_COLUMNS):
            for _ in range(int(whole)):
                logits = hidden @ head.t()
            if len(part):
                part @ head.t()
            logits @ head
            logits.t() @ hidden


def one_head_step(shape: HeadShape, way: HeadWay) -> Iterator[None]:
    """One step for a process of its own; the inputs do not count."""
    inputs = HeadInputs(shape)
    if way.kind == "frozen":
        _ = inputs.rows
    yield
    way.step(inputs)
