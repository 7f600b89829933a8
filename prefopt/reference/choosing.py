"""In which form a reference's whole distributions are kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from prefopt.data.collation import Collator
from prefopt.errors import UserError
from prefopt.reference.forms import EXPECTED, HIDDEN, ExpectedHeadRows, HiddenStates, WholeForm
from prefopt.reference.live import LiveReference
from prefopt.scoring.distribution import Distribution
from prefopt.scoring.model import causal_lm

FROM_EXPECTED = frozenset({"logp", "entropy", "forward_kl"})
"""Statistics that the mean rows of the reference's head give."""


def choose_form(
    wanted: str, source: LiveReference, policy: nn.Module, collator: Collator, statistics: Collection[str]
) -> WholeForm:
    """Expected head rows where they say all that the loss asks for, hidden states otherwise; or the form `wanted`.

    `source` is in its place, and `policy` is what will be trained. Call it under the autocast that training has, which
    decides how the head's products are made. Raises `UserError` when expected rows are wanted and
    would be wrong.
    """
    device = next(policy.parameters()).device
    batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in collator([]).items()}
    reference = source.distribution(policy, batch)
    reason = _not_expected(policy, reference, statistics)
    if wanted == EXPECTED and reason:
        raise UserError(f"reference.form: expected head rows cannot be kept: {reason}. Write form: {HIDDEN}")
    if wanted == HIDDEN or reason:
        return HiddenStates(_copy(reference))
    return ExpectedHeadRows(reference.head.shape[1], narrow=reference.narrow)


def _not_expected(policy: nn.Module, reference: Distribution, statistics: Collection[str]) -> str:
    """Why the mean rows of the reference's head do not give the statistics; empty when they do."""
    head: Any = causal_lm(policy).get_output_embeddings()
    bias = getattr(head, "bias", None)
    if other := set(statistics) - FROM_EXPECTED:
        return f"the loss asks for {', '.join(sorted(other))}"
    if reference.softcap is not None:
        return "this model caps its logits"
    if head.weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the policy's output head trains"
    if not (_same(head.weight, reference.head) and _same(bias, reference.bias)):
        return "policy and reference have different output heads"
    return ""


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.to(other.device), other)


def _copy(reference: Distribution) -> Distribution:
    """The head alone, as it is now; one that does not train is not held twice."""
    head, bias = (_kept(parameter) for parameter in (reference.head, reference.bias))
    assert head is not None
    return Distribution(reference.hidden.detach(), head, bias, reference.scale, reference.softcap)


def _kept(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None:
        return None
    return parameter.detach().clone() if parameter.requires_grad else parameter.detach()
