"""The softmax head: hidden states of scored tokens in, numbers per token out, no `[M, V]` tensor in between.

Logits are made a tile at a time (some tokens by some vocabulary entries), folded into running sums (`sums.py`) and
thrown away; the backward pass makes them again (`gradients.py`). What is kept between the two passes is flat: a few
`[M]` vectors beside the inputs. Letters: `M` scored tokens, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.errors import UserError, nearest
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.expected import expected_forward_kl
from prefopt.scoring.gradients import Upstream, gradients
from prefopt.scoring.scores import STATISTICS
from prefopt.scoring.sums import Totals, sweep, sweep_both
from prefopt.scoring.tiles import TiledLogits, full_precision, sum_dtype
from prefopt.scoring.zero import gathered

_DIVERGENCES = ("forward_kl", "reverse_kl")
_OF_THE_REFERENCE = ("ref_logp", *_DIVERGENCES)


def score_tokens(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    ref_bias: Tensor | None = None,
    statistics: tuple[str, ...] = ("logp",),
    softcap: float | None = None,
    scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_scale: float | None = None,
) -> dict[str, Tensor]:
    """Statistics of the next-token distributions `softmax(softcap(scale * (hidden head^T + bias)))`.

    `hidden` is `[M, H]`, `head` `[V, H]`, `targets` `[M]` int64, `bias` `[V]`; a `softcap` c means `c * tanh(z / c)`.
    The reference has its own `ref_hidden` `[M, Hr]`, `ref_head` `[V, Hr]` and `ref_bias`; its cap and scale are the
    policy's unless given (`math.inf` for no cap). Returns `{name: [M]}` in nats for the names in `statistics`:

    - `logp`: log-probability of the target.
    - `entropy`: entropy of the whole distribution; costs one pass more over each tile.
    - `forward_kl`: KL(reference || policy) of the whole distributions. `reverse_kl`: KL(policy || reference).
    - `ref_logp`: `logp` under the reference.

    All but `ref_logp` are differentiable in `hidden`, `head` and `bias`; no gradient reaches the reference. Numbers are
    float64 if hidden states or a head are, float32 otherwise, whatever autocast says; on CUDA autocast to bf16 rounds
    what enters the matrix products, as in any other layer, and not the logits. Memory does not grow with `V`.
    Without any token the gradients are zeros, not absent, so every rank of a distributed run has them. A target outside
    the vocabulary gives NaN (a check would stall a GPU). Raises `ValueError` for an unknown name or a missing
    reference, `UserError` for two vocabularies of different size.
    """
    policy, reference = Distribution(hidden, head, bias, scale, softcap), None
    if ref_hidden is not None and ref_head is not None:
        cap = softcap if ref_softcap is None else ref_softcap
        cap = None if cap is None or math.isinf(cap) else cap
        reference = Distribution(ref_hidden, ref_head, ref_bias, scale if ref_scale is None else ref_scale, cap)
    return statistics_of(policy, targets, statistics, reference)


def statistics_of(
    policy: Distribution,
    targets: Tensor,
    statistics: tuple[str, ...],
    reference: Distribution | ExpectedRows | None = None,
) -> dict[str, Tensor]:
    """What `score_tokens` returns, for a policy and a reference that are already put together."""
    _check_statistics(statistics, reference is not None)
    if isinstance(reference, ExpectedRows):
        return _beside_rows(policy, targets, statistics, reference)
    scores: dict[str, Tensor] = {}
    if reference is not None:
        reference = _whole_distribution(reference, policy.narrow)
        _check_vocabularies(policy, reference)
        if not set(statistics) & set(_DIVERGENCES):  # two passes apart, so that only the policy's is kept for later
            with torch.no_grad(), full_precision(reference.hidden):
                scores["ref_logp"] = sweep(TiledLogits(reference, sum_dtype(reference)), targets).logp
            reference = None
    if set(statistics) - set(scores):
        scores |= _score(policy, targets, statistics, reference)
    return {name: scores[name] for name in statistics}


def _score(
    policy: Distribution, targets: Tensor, statistics: tuple[str, ...], reference: Distribution | None
) -> dict[str, Tensor]:
    """The statistics that one differentiable pass gives, and the policy's log-sum-exp as `lse`."""
    tensors = policy.hidden, _whole(policy.head), _whole(policy.bias)
    about = policy.scale, policy.softcap, policy.narrow
    results = _HeadScores.apply(*tensors, targets, about, reference, statistics)
    return {name: value for name, value in zip(_RESULTS, results, strict=True) if value is not None}


def _beside_rows(
    policy: Distribution, targets: Tensor, statistics: tuple[str, ...], reference: ExpectedRows
) -> dict[str, Tensor]:
    """Statistics against a reference of which the expected rows of the common head are known."""
    if "reverse_kl" in statistics:
        raise UserError(
            "the reverse KL is not a function of the reference's expected head rows. Write reference: {source: live}"
        )
    scores = _score(policy, targets, statistics, None)
    scores["ref_logp"] = reference.ref_logp
    if "forward_kl" in statistics:
        scores["forward_kl"] = expected_forward_kl(policy, scores["lse"], reference)
    return {name: scores[name] for name in statistics}


def _check_statistics(statistics: tuple[str, ...], reference_given: bool) -> None:
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic `{name}`.{nearest(name, STATISTICS)} Known: {', '.join(STATISTICS)}")
    if reference_given != any(name in statistics for name in _OF_THE_REFERENCE):
        raise ValueError(
            f"statistics {', '.join(_OF_THE_REFERENCE)} and a reference (`ref_hidden` and `ref_head`) go together"
        )


def _check_vocabularies(policy: Distribution, reference: Distribution) -> None:
    ours, theirs = policy.head.shape[0], reference.head.shape[0]
    if ours != theirs:
        raise UserError(
            f"the head of the reference has {theirs} rows and that of the policy {ours}: their distributions cannot be "
            "compared. Use a reference of the same family, with its embeddings resized as the policy's are."
        )


def _whole(parameter: Tensor | None) -> Any:
    """A parameter that is sharded over ranks (DTensor) in full; any other as it is.

    Only without gradient: each rank would keep the gradient of its own tokens and drop those of the others.
    """
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled():
        raise ValueError("the head is sharded over ranks, so its gradient cannot be made here; gather it first")
    return parameter.full_tensor()


@torch.no_grad()
def _whole_distribution(model: Distribution, narrow: bool) -> Distribution:
    """A reference without gradient, its products made as the policy's are: they cancel where the two are equal."""
    about = model.scale, model.softcap, narrow
    return Distribution(model.hidden.detach(), _whole(model.head), _whole(model.bias), *about)


_RESULTS = ("logp", "lse", "entropy", "forward_kl", "reverse_kl", "ref_logp")


class _HeadScores(torch.autograd.Function):
    """The statistics named in `_RESULTS` (None unless asked for); its backward pass makes the tiles again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        about: tuple[float, float | None, bool],
        reference: Distribution | None,
        statistics: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)  # an entropy that is only logged must not cost a backward pass
        found = _totals(Distribution(hidden, weight, bias, *about), targets, reference, statistics)
        ctx.about, ctx.reference = about, None
        kept: tuple[Tensor | None, ...] = ()
        if reference is not None:
            ctx.reference = reference.scale, reference.softcap, reference.narrow
            ctx.mark_non_differentiable(found.ref_logp)
            kept = (found.ref_lse, found.reverse_kl, reference.hidden, reference.head, reference.bias)
        ctx.save_for_backward(hidden, weight, bias, targets, found.lse, found.entropy, *kept)
        return tuple(getattr(found, name) for name in _RESULTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy, *kept = ctx.saved_tensors
        ref_lse, reverse_kl, *reference_tensors = kept or (None, None)
        grad_logp, grad_lse, grad_entropy, grad_forward, grad_reverse, _ = grads
        upstream = Upstream(
            targets,
            lse,
            torch.zeros_like(lse) if grad_logp is None else grad_logp,
            grad_lse,
            None if grad_entropy is None else entropy,
            grad_entropy,
            ref_lse,
            None if grad_reverse is None else reverse_kl,
            grad_forward,
            grad_reverse,
        )
        policy, reference = Distribution(hidden, weight, bias, *ctx.about), None
        if grad_forward is not None or grad_reverse is not None:
            reference = Distribution(*reference_tensors, *ctx.reference)
        with full_precision(hidden), gathered(weight, bias):
            theirs = None if reference is None else TiledLogits(reference, lse.dtype)
            made = gradients(TiledLogits(policy, lse.dtype), theirs, upstream, ctx.needs_input_grad[:3])
        cast = [
            None if new is None else new.to(old.dtype) for new, old in zip(made, (hidden, weight, bias), strict=True)
        ]
        return (*cast, None, None, None, None)


def _totals(
    policy: Distribution, targets: Tensor, reference: Distribution | None, statistics: tuple[str, ...]
) -> Totals:
    dtype = sum_dtype(policy, reference)
    with full_precision(policy.hidden):
        ours = TiledLogits(policy, dtype)
        if reference is None:
            return sweep(ours, targets, with_entropy="entropy" in statistics)
        return sweep_both(ours, targets, TiledLogits(reference, dtype), statistics)
