"""The harness itself: its server forks cleanly, a run is the same each time, and a run that differs is seen."""

from __future__ import annotations

import pytest

from tests.faults.bench import CASES
from tests.faults.prints import checkpoints


def test_the_server_is_one_thread_when_it_forks(bench):
    launch = bench.server.start(["--help"], bench.folder)
    assert launch.end() == [0]
    assert launch.first.events[0]["alone"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_with_the_same_bits_each_time(bench, tmp_path, ends_exactly, case, ranks):
    ends_exactly(case, tmp_path / "run", ranks)


def test_a_run_that_draws_other_numbers_is_told_apart(bench, tmp_path):
    run = tmp_path / "run"
    bench.start("adapter", run, seed=1).end()
    assert {"adapter_model.safetensors", "checkpoint/optimizer.pt", "metrics.jsonl"} <= {
        *bench.differences("adapter", run)
    }
    assert checkpoints(run)[-1].name == "checkpoint-12"
