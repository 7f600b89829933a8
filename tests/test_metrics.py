"""A metric is the plain mean over rows, whatever the batches and the ranks."""

from __future__ import annotations

import math
import os
import random
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from prefopt.metrics import Figure, MetricSums


def cut(n: int, sizes: list[int]) -> list[slice]:
    """Slices of `range(n)` that walk through `sizes` over and over."""
    slices, start, turn = [], 0, 0
    while start < n:
        slices.append(slice(start, start + sizes[turn % len(sizes)]))
        start, turn = slices[-1].stop, turn + 1
    return slices


@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("sizes", [[1], [2], [5], [3, 0, 1], [17]])
def test_any_split_gives_the_plain_mean(n, sizes):
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    sums = MetricSums()
    for part in cut(n, sizes):
        sums.add({"value": values[part], "right": values[part] > 0})
    figures = sums.reduce()
    assert figures["value"] == pytest.approx(values.mean().item(), abs=1e-12)
    assert figures["right"] == pytest.approx((values > 0).double().mean().item(), abs=1e-12)


def test_low_precision_values_are_summed_in_float64():
    sums = MetricSums()
    for _ in range(100):
        sums.add({"ones": torch.ones(1000, dtype=torch.bfloat16)})
    assert sums.reduce() == {"ones": 1.0}


def test_a_sum_with_its_count():
    sums = MetricSums()
    for tokens in (3, 5):
        sums.add_sum("entropy", torch.tensor(2.0 * tokens), tokens)
    assert sums.reduce_figures() == {"entropy": Figure(2.0, 8.0)}


def test_nan_is_not_averaged_away():
    sums = MetricSums()
    sums.add({"loss": torch.tensor([1.0, math.nan]), "other": torch.tensor([1.0, 3.0])})
    sums.add({"loss": torch.tensor([1.0])})
    figures = sums.reduce()
    assert math.isnan(figures["loss"])
    assert figures["other"] == 2.0


def test_nothing_added_means_no_name():
    sums = MetricSums()
    assert sums.reduce() == {}
    sums.add({"empty": torch.zeros(0)})
    assert sums.reduce() == {}


def test_reduce_starts_anew():
    sums = MetricSums()
    sums.add({"a": torch.tensor([1.0, 2.0])})
    assert sums.reduce() == {"a": 1.5}
    assert sums.reduce() == {}


def test_a_batch_mean_is_refused():
    with pytest.raises(ValueError, match="one value per row"):
        MetricSums().add({"loss": torch.tensor(1.0)})


def test_no_gradient_is_kept():
    sums = MetricSums()
    sums.add({"a": torch.ones(2, requires_grad=True) * 2})
    sums.add_sum("b", torch.ones(1, requires_grad=True).sum(), 1)
    assert not any(value.requires_grad for value in sums._sums.values())


def rows_of(case: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case)
    return torch.randn(case, dtype=torch.float64, generator=generator)


def reduce_on_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes: takes every second row, in batches of its own size, and writes what it got."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    sums, results = MetricSums(), []
    for case in (1, 2, 7, 13):
        rows = rows_of(case)[rank::2]
        for part in cut(len(rows), [1 + rank, 2]):
            sums.add({"value": rows[part]})
        if rank == 1:
            sums.add({"only/second": torch.full((3,), float(case))})
        results.append(sums.reduce(accelerator))
    results.append(sums.reduce(accelerator))
    torch.save(results, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


def test_two_ranks_agree_with_the_plain_mean_even_with_different_names(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(reduce_on_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first.pop() == {}
    for case, figures in zip((1, 2, 7, 13), first, strict=True):
        assert figures["value"] == pytest.approx(rows_of(case).mean().item(), abs=1e-12)
        assert figures["only/second"] == case


def test_a_random_order_of_batches_changes_nothing():
    values = torch.rand(50, dtype=torch.float64)
    parts = cut(50, [7, 1, 4])
    random.Random(0).shuffle(parts)
    sums = MetricSums()
    for part in parts:
        sums.add({"value": values[part]})
    assert sums.reduce()["value"] == pytest.approx(values.mean().item(), abs=1e-12)
