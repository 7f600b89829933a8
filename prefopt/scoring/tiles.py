"""Logits in tiles: some tokens by some vocabulary entries at a time, made when they are read and never kept.

Letters: `M` scored tokens, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefopt.scoring.distribution import Distribution

# A tile of logits should stay in a core's cache on a CPU and keep all multiprocessors of a GPU busy.
CPU_TILE_BYTES = 4 * 2**20
DEVICE_TILE_BYTES = 128 * 2**20
CPU_TILE_TOKENS = 1024
DEVICE_TILE_TOKENS = 4096
TILE_ALIGNMENT = 256

Operands = tuple[Tensor, Tensor | None]


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products alone."""
    return torch.autocast(tensor.device.type, enabled=False)


def sum_dtype(*models: Distribution | None) -> torch.dtype:
    """The dtype of sums and results: float64 if any hidden states or head are, float32 otherwise."""
    wide = any(model is not None and torch.float64 in (model.hidden.dtype, model.head.dtype) for model in models)
    return torch.float64 if wide else torch.float32


def tile_shape(tokens: int, width: int, vocabulary: int, itemsize: int, on_cpu: bool) -> tuple[int, int]:
    """Tokens and vocabulary entries of one tile: all tokens up to a limit, then the bytes decide.

    The bytes bound the tile of logits and the slice of the head `[columns, width]` beside it. Odd widths make matrix
    products slow, so a number of columns is a multiple of `TILE_ALIGNMENT` where that leaves any.
    """
    rows = max(1, min(tokens, CPU_TILE_TOKENS if on_cpu else DEVICE_TILE_TOKENS))
    budget = CPU_TILE_BYTES if on_cpu else DEVICE_TILE_BYTES
    columns = budget // (max(rows, width) * itemsize)
    return rows, max(1, min(vocabulary, columns // TILE_ALIGNMENT * TILE_ALIGNMENT or columns))


def tiles(policy: TiledLogits, reference: TiledLogits | None = None) -> tuple[int, list[slice]]:
    """The largest number of tokens in a tile, and the slices of the vocabulary; the same for both models."""
    width = max(model.hidden.shape[1] for model in (policy, reference) if model is not None)
    tokens, vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
    rows, columns = tile_shape(tokens, width, vocabulary, policy.dtype.itemsize, policy.hidden.device.type == "cpu")
    return rows, list(slices(vocabulary, columns))


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Index of each target inside the tile `[rows, 1]` (clamped) and whether it lies there `[rows]`."""
    local = targets - columns.start
    width = columns.stop - columns.start
    return local.clamp(0, width - 1).unsqueeze(1), (local >= 0) & (local < width)


class TiledLogits:
    """The logits of one model at `M` tokens, made tile by tile; a comparison of two models holds two of these.

    `dtype` is that of sums and results, and of the operands of matrix products unless the model is `narrow`: then those
    are rounded to bf16, the logits' gradient as well, as in any bf16 head, and the products are not.
    """

    def __init__(self, model: Distribution, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.narrow = model.narrow
        self.operand_dtype = torch.bfloat16 if self.narrow else dtype
        self.hidden = model.hidden.to(self.operand_dtype)
        self.weight, self.bias = model.head, model.bias
        self.scale, self.softcap = model.scale, model.softcap

    def at(self, tokens: Tensor | slice) -> TiledLogits:
        """The logits of some of the tokens."""
        return TiledLogits(
            Distribution(self.hidden[tokens], self.weight, self.bias, self.scale, self.softcap, self.narrow), self.dtype
        )

    def operands(self, columns: slice) -> Operands:
        """Weight and bias of some vocabulary entries, ready to multiply: made once for all tokens."""
        if self.bias is None:
            return self.weight[columns].to(self.operand_dtype), None
        # A bias of -inf marks an entry that cannot occur; a finite one as good as that keeps 0 * inf out of the sums.
        bias = self.bias[columns].to(self.dtype).clamp(min=torch.finfo(self.dtype).min / 2**40)
        return self.weight[columns].to(self.operand_dtype), bias

    def logits(self, rows: slice, operands: Operands) -> Tensor:
        """One tile of logits, a fresh tensor."""
        weight, bias = operands
        z = self.product(self.hidden[rows], weight.t())
        if bias is not None:
            z.add_(bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor | None) -> Tensor | float:
        """Derivative of the logits `z` with respect to `hidden weight^T + bias`; without a cap z does not matter."""
        if self.softcap is None or z is None:
            return self.scale
        return (z / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Matrix product in `dtype`; operands are narrowed first where the device prefers that."""
        left, right = left.to(self.operand_dtype), right.to(self.operand_dtype)
        return widened_product(left, right) if self.narrow else torch.mm(left, right)


def widened_product(left: Tensor, right: Tensor) -> Tensor:
    """The float32 product of two bf16 matrices, which is nowhere rounded to bf16."""
    return torch.mm(left, right, out_dtype=torch.float32)
