"""Every way is fed the same number of pairs, and the floor reads each token once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.benchmark.floor import Floor
from prefopt.benchmark.profiles import made_up
from prefopt.benchmark.setting import SMALL, Options, quiet
from prefopt.benchmark.shares import PARTS, shares_of
from prefopt.benchmark.ways import AS_DOCUMENTED, FLOOR, GROUPED, PLAIN, WAYS, Work, measure
from prefopt.data.collation import row_length

OPTIONS = Options(Path("unused"), rounds=1, steps=2, batch_size=2)


@pytest.fixture(scope="module")
def work() -> Work:
    return Work.of(made_up("short", (20, 6, 5), (0.5, 0.5, 0.5), count=40), OPTIONS, SMALL)


def test_every_way_is_timed_and_fed_the_same_pairs(work):
    times, loads = measure(work)
    assert {name: len(seconds) for name, seconds in times.items()} == {way.name: 1 for way in WAYS}
    assert {load.pairs for load in loads.values()} == {4}
    assert loads[GROUPED.name].unique == loads[PLAIN.name].unique == loads[FLOOR.name].unique
    assert loads[FLOOR.name].padding == 0 < loads[GROUPED.name].padding == loads[PLAIN.name].padding


def test_padding_is_what_rows_of_one_length_would_spare(tmp_path):
    even = Work(OPTIONS, SMALL, "float32", *[np.full((2, 2, 3), 5)] * 2)
    _, loads = measure(even, (GROUPED, PLAIN))
    assert {load.padding for load in loads.values()} == {0}


def test_both_trainers_train_on_the_same_tokens(work, tmp_path):
    with quiet():
        theirs, ours = (work.trainer(way, tmp_path).train_dataset for way in (GROUPED, PLAIN))
    assert len(theirs) == len(ours) == 4
    for a, b in zip(theirs, ours, strict=True):
        for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert a[part] == b[part].tolist()


def test_rows_in_random_order_are_other_rows(work):
    assert work.lengths(AS_DOCUMENTED).tolist() != work.lengths(GROUPED).tolist()


def test_the_floor_reads_each_token_once_and_scores_the_answers_alone(work, monkeypatch):
    floor = Floor(SMALL, list(work.grouped), "float32")
    before = floor.model.lm_head.weight.detach().clone()
    seen: dict[str, int] = {}
    floor.model.base_model.register_forward_pre_hook(lambda _, args: seen.update(read=args[0].numel()))
    linear = torch.nn.functional.linear

    def watched(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if weight is floor.model.lm_head.weight:
            seen["scored"] = len(hidden)
        return linear(hidden, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    floor.step()
    assert 0 <= seen["read"] - work.grouped[0].sum() < 2  # two rows of one length
    assert seen["scored"] == work.grouped[0][:, 1:].sum()
    assert not torch.equal(before, floor.model.lm_head.weight)


def test_the_parts_of_a_step_make_the_whole(work, tmp_path):
    with quiet():
        for way in (GROUPED, PLAIN):
            shares = shares_of(work.trainer(way, tmp_path))
            assert list(shares) == list(PARTS)
            assert sum(shares.values()) == pytest.approx(1)
            assert all(share > 0 for share in shares.values())


def test_plain_rows_are_what_lengths_count(work, tmp_path):
    with quiet():
        rows = work.trainer(PLAIN, tmp_path).train_dataset.rows
    assert sum(map(row_length, rows)) == (work.grouped @ [2, 1, 1]).sum()
