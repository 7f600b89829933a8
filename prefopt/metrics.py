"""Sums and counts: the one way a metric becomes a number.

A mean of batch means is wrong as soon as batches or ranks differ in size. Here every metric is a sum and a count,
added over micro-batches on the device and over ranks in one collective, and divided once at the end. So the same
rows give the same figure however they were split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Number = Tensor | float


@dataclass(frozen=True)
class Figure:
    """A metric's value, and the number of values it is the mean of."""

    value: float
    count: float


class MetricSums:
    """Running sums of metrics between two logging events.

    Sums stay on the device in float64 and nothing here waits for it before `reduce`. A NaN stays a NaN:
    one bad row makes its metric NaN for all to see, instead of being left out of the mean.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Number] = {}
        self._counts: dict[str, Number] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value per row (or pair, or token): each tensor is `[n]`, any `n`, any dtype.

        A scalar is refused: it would be a mean already, with its count lost.
        """
        for name, values in metrics.items():
            if values.dim() != 1:
                raise ValueError(f"metric {name!r} has shape {tuple(values.shape)}: give one value per row")
            self.add_sum(name, values.detach().sum(dtype=_precision(values.device)), values.numel())

    def add_sum(self, name: str, total: Number, count: Number) -> None:
        """Add the sum of `count` values at once; `count` may be a sum of weights."""
        if isinstance(total, Tensor):
            total = total.detach().to(_precision(total.device))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + count

    def add_sums(self, sums: Mapping[str, tuple[Number, Number]]) -> None:
        """Add several sums, each with its count."""
        for name, (total, count) in sums.items():
            self.add_sum(name, total, count)

    def reduce(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The value of every metric over all ranks; see `reduce_figures`."""
        return {name: figure.value for name, figure in self.reduce_figures(accelerator).items()}

    def reduce_figures(self, accelerator: Accelerator | None = None) -> dict[str, Figure]:
        """Every metric over all ranks with its count, equal on every rank; then start anew.

        Every rank must call this, also one that has added nothing: the ranks first agree on the names. A mean over
        no rows at all is left out.
        """
        names = sorted(self._sums)
        if accelerator is None or accelerator.num_processes == 1:
            numbers = self._as_tensor(names, None)
        else:
            names = sorted(set(gather_object(names)))
            numbers = cast(Tensor, accelerator.reduce(self._as_tensor(names, accelerator.device), reduction="sum"))
        self.clear()
        return _divide(names, numbers)

    def state(self) -> dict[str, tuple[float, float]]:
        """This rank's sum and count of every metric, as `add_sum` takes them back. It waits for the device."""
        return {name: (float(total), float(self._counts[name])) for name, total in self._sums.items()}

    def clear(self) -> None:
        """Forget everything added so far."""
        self._sums.clear()
        self._counts.clear()

    def _as_tensor(self, names: list[str], device: torch.device | None) -> Tensor:
        """Sums, then counts, of the names in their order: `[2K]`; zeros for a name this rank does not know."""
        if device is None:
            tensors = (value for value in self._sums.values() if isinstance(value, Tensor))
            device = next((value.device for value in tensors), torch.device("cpu"))
        precision = _precision(device)
        numbers = [self._sums.get(name, 0.0) for name in names] + [self._counts.get(name, 0) for name in names]
        scalars = [torch.as_tensor(number, dtype=precision, device=device) for number in numbers]
        return torch.stack(scalars) if scalars else torch.zeros(0, dtype=precision, device=device)


def _precision(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _divide(names: list[str], numbers: Tensor) -> dict[str, Figure]:
    values = numbers.tolist()
    parts = zip(names, values[: len(names)], values[len(names) :], strict=True)
    return {name: Figure(total / count, count) for name, total, count in parts if count}
