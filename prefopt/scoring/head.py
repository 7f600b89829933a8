"""The softmax head: hidden states of scored tokens in, one number per token out, no `[M, V]` tensor in between.

Logits are made a tile at a time (some tokens by some vocabulary entries), folded into running sums and thrown away; the
backward pass makes them again. What is kept between the two passes is flat: a few `[M]` vectors beside the inputs.

Letters: `M` scored tokens, `H` hidden size, `V` vocabulary. With `z = softcap(scale * (h W^T + b))`, `p = softmax(z)`:

    logp = z_y - lse(z)         d logp    / dz_v = 1[v = y] - p_v
    entropy = -sum p log p      d entropy / dz_v = -p_v (log p_v + entropy)

Two disjoint parts of the vocabulary join exactly: their log-sum-exps by `logaddexp`, their entropies by the chain rule
of entropy, `H = sum_i w_i (H_i - log w_i)` with `w_i` the mass of part i. Nothing there subtracts two large numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.errors import UserError, nearest
from prefopt.scoring.scores import STATISTICS
from prefopt.scoring.zero import gathered

# A tile of logits should stay in a core's cache on a CPU and keep all multiprocessors of a GPU busy.
CPU_TILE_BYTES = 4 * 2**20
DEVICE_TILE_BYTES = 128 * 2**20
CPU_TILE_TOKENS = 1024
DEVICE_TILE_TOKENS = 4096
TILE_ALIGNMENT = 256

_IMPLEMENTED = ("logp", "ref_logp", "entropy")
_MM_WIDENS = hasattr(torch.ops.aten.mm, "dtype")  # bf16 operands, float32 result: torch 2.8 and later, CUDA only


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
) -> dict[str, Tensor]:
    """Statistics of the next-token distributions `softmax(softcap(scale * (hidden head^T + bias)))`.

    `hidden` is `[M, H]`, `head` `[V, H]`, `targets` `[M]` int64, `bias` `[V]`; a `softcap` c means `c * tanh(z / c)`.
    Returns `{name: [M]}` in nats for the names in `statistics`:

    - `logp`: log-probability of the target. Differentiable in `hidden`, `head` and `bias`.
    - `entropy`: entropy of the whole distribution. Differentiable likewise; costs one pass more over each tile.
    - `ref_logp`: `logp` under `ref_hidden`, `ref_head` and `ref_bias` (same cap and scale), without gradient.

    Numbers are float64 if hidden states or head are, float32 otherwise, whatever autocast says. Memory does not grow
    with `V`. Without any token the gradients are zeros, not absent, so every rank of a distributed run has them. A
    target outside the vocabulary gives NaN (a check would stall a GPU). Raises `ValueError` for an unknown name or a
    missing reference, `UserError` for a known statistic this version does not compute.
    """
    _check_statistics(statistics, (ref_hidden is not None, ref_head is not None))
    scores: dict[str, Tensor] = {}
    if "logp" in statistics or "entropy" in statistics:
        arguments = (hidden, _whole(head), _whole(bias), targets, scale, softcap, "entropy" in statistics)
        scores["logp"], scores["entropy"] = _HeadScores.apply(*arguments)
    if ref_hidden is not None and ref_head is not None and "ref_logp" in statistics:
        with torch.no_grad(), _full_precision(ref_hidden):
            reference = _Head(ref_hidden, _whole(ref_head), _whole(ref_bias), scale, softcap)
            scores["ref_logp"] = _sweep(reference, targets, with_entropy=False)[0]
    return {name: scores[name] for name in statistics}


def _check_statistics(statistics: tuple[str, ...], reference_given: tuple[bool, bool]) -> None:
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic `{name}`.{nearest(name, STATISTICS)} Known: {', '.join(STATISTICS)}")
        if name not in _IMPLEMENTED:
            raise UserError(
                f"statistic `{name}` compares two whole next-token distributions, which this version does not compute. "
                f"Choose a loss that needs only: {', '.join(_IMPLEMENTED)}."
            )
    if reference_given != ("ref_logp" in statistics,) * 2:
        raise ValueError("statistic `ref_logp` and arguments `ref_hidden` and `ref_head` go together: all or none")


def _whole(parameter: Tensor | None) -> Any:
    """A parameter that is sharded over ranks (DTensor) in full; any other as it is.

    Only without gradient: each rank would keep the gradient of its own tokens and drop those of the others.
    """
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled():
        raise ValueError("the head is sharded over ranks, so its gradient cannot be made here; gather it first")
    return parameter.full_tensor()


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _tile_shape(hidden: Tensor, vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Tokens and vocabulary entries of one tile: all tokens up to a limit, then the bytes decide.

    The bytes bound the tile of logits and the slice of the head `[columns, H]` beside it. Odd widths make matrix
    products slow, so a width is a multiple of `TILE_ALIGNMENT` where that leaves any.
    """
    tokens, width = hidden.shape
    on_cpu = hidden.device.type == "cpu"
    rows = max(1, min(tokens, CPU_TILE_TOKENS if on_cpu else DEVICE_TILE_TOKENS))
    budget = CPU_TILE_BYTES if on_cpu else DEVICE_TILE_BYTES
    columns = budget // (max(rows, width) * itemsize)
    return rows, max(1, min(vocabulary, columns // TILE_ALIGNMENT * TILE_ALIGNMENT or columns))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _Head:
    """The logits of one model at `M` tokens, made tile by tile; a comparison of two models holds two of these.

    `dtype` is that of sums and results. Operands of matrix products have it too, except bf16 on CUDA: there a product
    of bf16 operands can have a float32 result, and only the logits' gradient is rounded to bf16, as in any bf16 head.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
    ) -> None:
        types = {hidden.dtype, weight.dtype}
        self.dtype = torch.float64 if torch.float64 in types else torch.float32
        self.narrow = types == {torch.bfloat16} and hidden.is_cuda and _MM_WIDENS
        self.operand_dtype = torch.bfloat16 if self.narrow else self.dtype
        self.hidden = hidden.to(self.operand_dtype)
        self.weight, self.bias = weight, bias
        self.scale, self.softcap = scale, softcap

    def tiles(self) -> tuple[list[slice], list[slice]]:
        """Slices of the tokens and of the vocabulary."""
        vocabulary = self.weight.shape[0]
        rows, columns = _tile_shape(self.hidden, vocabulary, self.dtype.itemsize)
        return list(_slices(self.hidden.shape[0], rows)), list(_slices(vocabulary, columns))

    def operands(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some vocabulary entries, ready to multiply: made once for all tokens."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.operand_dtype), bias

    def logits(self, rows: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One tile of logits, a fresh tensor."""
        z = self.product(self.hidden[rows], weight.t())
        if bias is not None:
            z.add_(bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of the logits `z` with respect to `hidden weight^T + bias`."""
        if self.softcap is None:
            return self.scale
        return (z / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Matrix product in `dtype`; operands are narrowed first where the device prefers that."""
        left, right = left.to(self.operand_dtype), right.to(self.operand_dtype)
        return torch.mm(left, right, out_dtype=torch.float32) if self.narrow else torch.mm(left, right)


def _in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Index of each target inside the tile `[rows, 1]` (clamped) and whether it lies there `[rows]`."""
    local = targets - columns.start
    width = columns.stop - columns.start
    return local.clamp(0, width - 1).unsqueeze(1), (local >= 0) & (local < width)


def _sweep(head: _Head, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`logp`, log-sum-exp and, if asked for, entropy: each `[M]`."""
    lse = head.hidden.new_full(targets.shape, -torch.inf, dtype=head.dtype)
    target_logit = torch.full_like(lse, torch.nan)
    entropy = torch.zeros_like(lse) if with_entropy else None
    row_tiles, column_tiles = head.tiles()
    for columns in column_tiles:
        weight, bias = head.operands(columns)
        for rows in row_tiles:
            z = head.logits(rows, weight, bias)
            index, inside = _in_tile(targets[rows], columns)
            target_logit[rows] = torch.where(inside, z.gather(1, index).squeeze(1), target_logit[rows])
            part = z.logsumexp(1) if with_entropy else _logsumexp_(z)
            joined = torch.logaddexp(lse[rows], part)
            if entropy is not None:
                entropy[rows] = _join_entropies(entropy[rows], lse[rows] - joined, _entropy_(z, part), part - joined)
            lse[rows] = joined
    return target_logit - lse, lse, entropy


def _logsumexp_(z: Tensor) -> Tensor:
    """Log-sum-exp of each row; overwrites `z`, which spares a tile."""
    peak = z.amax(1).clamp_(min=torch.finfo(z.dtype).min)  # finite, so that a row of -inf gives -inf and not NaN
    mass = z.sub_(peak.unsqueeze(1)).exp_().sum(1)
    return peak + mass.log()


def _entropy_(z: Tensor, lse: Tensor) -> Tensor:
    """Entropy of each row's softmax, given its log-sum-exp; overwrites `z`."""
    log_p = z.sub_(lse.unsqueeze(1))
    return -log_p.exp().mul_(log_p).sum(1)


def _join_entropies(first: Tensor, first_log_mass: Tensor, second: Tensor, second_log_mass: Tensor) -> Tensor:
    """Entropy of a distribution made of two disjoint parts, from theirs and the logarithms of their masses."""
    mass, rest = first_log_mass.exp(), second_log_mass.exp()
    which: Tensor = torch.special.entr(mass) + torch.special.entr(rest)
    return mass * first + rest * second + which


class _HeadScores(torch.autograd.Function):
    """`logp` and `entropy` (None unless asked for) with a backward pass that makes the tiles again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)  # an entropy that is only logged must not cost a backward pass
        with _full_precision(hidden):
            logp, lse, entropy = _sweep(_Head(hidden, weight, bias, scale, softcap), targets, with_entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.scale, ctx.softcap = scale, softcap
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        with _full_precision(hidden), gathered(weight, bias):
            head = _Head(hidden, weight, bias, ctx.scale, ctx.softcap)
            upstream = _Upstream(targets, lse, entropy, (grad_logp, grad_entropy))
            gradients = _gradients(head, upstream, ctx.needs_input_grad[:3])
        like = (hidden, weight, bias)
        cast = [None if grad is None else grad.to(old.dtype) for grad, old in zip(gradients, like, strict=True)]
        return (*cast, None, None, None, None)


class _Upstream:
    """What the backward pass knows of each token: its target, the forward pass's sums, and the incoming gradients."""

    def __init__(self, targets: Tensor, lse: Tensor, entropy: Tensor | None, grads: tuple[Tensor | None, ...]) -> None:
        self.targets, self.lse, self.entropy = targets, lse, entropy
        grad_logp, self.grad_entropy = grads
        self.grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp

    def at_logits(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        """Gradient with respect to a tile of logits; overwrites `z`."""
        grad_logp = self.grad_logp[rows].unsqueeze(1)
        log_p = z.sub_(self.lse[rows].unsqueeze(1))
        if self.entropy is None or self.grad_entropy is None:
            gradient = log_p.exp_().mul_(-grad_logp)
        else:
            surprise = log_p + self.entropy[rows].unsqueeze(1)
            pull = surprise.mul_(self.grad_entropy[rows].unsqueeze(1)).add_(grad_logp)
            gradient = log_p.exp_().mul_(pull.neg_())
        index, inside = _in_tile(self.targets[rows], columns)
        return gradient.scatter_add_(1, index, grad_logp * inside.unsqueeze(1))


def _gradients(head: _Head, upstream: _Upstream, needed: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states and bias in `head.dtype` and of the weight in its own, or None where not needed.

    The vocabulary is the outer loop, so each slice of the weight's gradient is summed over all tokens in `head.dtype`
    and rounded once, and no float32 copy of a whole bf16 gradient exists.
    """
    for_hidden, for_weight, for_bias = needed
    grad_hidden = torch.zeros_like(head.hidden, dtype=head.dtype) if for_hidden else None
    grad_weight = torch.empty_like(head.weight) if for_weight else None
    grad_bias = torch.zeros_like(head.bias, dtype=head.dtype) if for_bias and head.bias is not None else None
    row_tiles, column_tiles = head.tiles()
    for columns in column_tiles:
        weight, bias = head.operands(columns)
        weight_sum = torch.zeros_like(weight, dtype=head.dtype) if for_weight else None
        for rows in row_tiles:
            z = head.logits(rows, weight, bias)
            slope = head.slope(z)
            dz = upstream.at_logits(z, rows, columns).mul_(slope)
            if grad_hidden is not None:
                grad_hidden[rows] += head.product(dz, weight)
            if weight_sum is not None:
                weight_sum += head.product(dz.t(), head.hidden[rows])
            if grad_bias is not None:
                grad_bias[columns] += dz.sum(0)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[columns] = weight_sum
    return grad_hidden, grad_weight, grad_bias
