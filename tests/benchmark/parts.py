"""Work for processes of their own, which import it by its name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

MIB = 2**20


def hold(mebibytes: int) -> None:
    torch.ones(mebibytes * MIB // 4).add_(1)


def hold_more(before: int, mebibytes: int) -> Iterator[None]:
    assert torch.get_num_threads() == 2
    kept = torch.ones(before * MIB // 4)
    hold(before)  # a peak that should not count
    yield
    hold(mebibytes)
    del kept
