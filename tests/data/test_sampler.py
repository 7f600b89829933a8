"""The order of rows: the same windows for any split, each row once, equal micro-batches on every rank."""

from __future__ import annotations

import random

import pytest

from prefopt.data.sampler import STRATEGIES, WindowSampler
from prefopt.errors import DataError

_RNG = random.Random(1)
LENGTHS = [_RNG.randint(3, 90) for _ in range(53)]


def windows(
    batch_size: int, accumulation: int, world: int, *, count: int = 53, epoch: int = 0, **settings
) -> list[set]:
    """The rows of each optimizer step, put together from what the ranks draw."""
    ranks = []
    for rank in range(world):
        sampler = WindowSampler(
            LENGTHS[:count],
            batch_size=batch_size,
            accumulation=accumulation,
            world_size=world,
            rank=rank,
            **settings,
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1
    slots = [[row for batches in ranks for row in batches[slot]] for slot in range(len(ranks[0]))]
    cut = range(0, len(slots), accumulation)
    return [sorted(row for slot in slots[start : start + accumulation] for row in slot) for start in cut]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world"), [(1, 12, 1), (3, 4, 1), (4, 3, 1), (2, 3, 2), (1, 3, 4)]
)
def test_steps_do_not_depend_on_the_split(strategy, batch_size, accumulation, world):
    assert windows(batch_size, accumulation, world, strategy=strategy) == windows(12, 1, 1, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 53])
def test_every_row_once_an_epoch(strategy, count):
    seen = [row for window in windows(2, 3, 2, count=count, strategy=strategy) for row in window]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_epochs_and_seeds_differ_and_repeat(strategy):
    first = windows(4, 1, 1, strategy=strategy)
    assert windows(4, 1, 1, strategy=strategy) == first
    assert windows(4, 1, 1, strategy=strategy, epoch=1) != first
    assert windows(4, 1, 1, strategy=strategy, seed=7) != first


def test_a_rank_may_be_empty_at_the_end():
    batches = list(WindowSampler(LENGTHS[:9], batch_size=4, world_size=2, rank=1, strategy="sequential"))
    assert [len(batch) for batch in batches] == [4, 0]


def test_ranks_share_a_short_step_evenly():
    for rank in range(2):
        sampler = WindowSampler(LENGTHS[:10], batch_size=4, world_size=2, rank=rank, strategy="sequential")
        assert [len(batch) for batch in sampler] == [4, 1]


def test_grouped_steps_come_in_random_order():
    """After the longest one; from long to short would be a curriculum."""
    sampler = WindowSampler(LENGTHS, batch_size=4, strategy="group_by_length")
    longest = [max(LENGTHS[row] for row in batch) for batch in sampler][1:]
    assert longest != sorted(longest, reverse=True) and longest != sorted(longest)


def test_drop_last_drops_the_short_step_only():
    kept = windows(4, 3, 1, strategy="random", drop_last=True)
    assert [len(window) for window in kept] == [12] * 4
    with pytest.raises(DataError, match="11 rows do not fill one step of 12"):
        windows(4, 3, 1, count=11, drop_last=True)


def test_grouping_saves_padding_and_starts_with_the_longest():
    def padding(strategy: str) -> int:
        batches = WindowSampler(LENGTHS, batch_size=4, strategy=strategy)
        return sum(
            max(LENGTHS[row] for row in batch) * len(batch) - sum(LENGTHS[row] for row in batch) for batch in batches
        )

    assert padding("group_by_length") < padding("random") / 2
    first = next(iter(WindowSampler(LENGTHS, batch_size=4, strategy="group_by_length")))
    assert max(LENGTHS) in [LENGTHS[row] for row in first]


def test_rows_of_a_step_are_dealt_by_length():
    sampler = WindowSampler(LENGTHS, batch_size=2, accumulation=3, strategy="random")
    first = [row for _, batch in zip(range(3), sampler, strict=False) for row in batch]
    lengths = [LENGTHS[row] for row in first]
    assert lengths == sorted(lengths, reverse=True)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="one of random"):
        WindowSampler(LENGTHS, batch_size=1, strategy="by_mood")


def test_rows_of_one_prompt_meet_in_a_micro_batch():
    """Where a step holds several; which rows a step holds does not change."""
    prompts = [row % 9 for row in range(53)]
    apart = WindowSampler(LENGTHS, batch_size=6, accumulation=2, strategy="random")
    together = WindowSampler(LENGTHS, batch_size=6, accumulation=2, strategy="random", prompts=prompts)
    assert [sorted(window) for window in together.windows()] == [sorted(window) for window in apart.windows()]

    def split_prompts(sampler: WindowSampler) -> int:
        batches = iter(list(sampler))
        pairs = zip(batches, batches, strict=False)
        return sum(len({prompts[row] for row in one} & {prompts[row] for row in other}) for one, other in pairs)

    assert split_prompts(together) <= 4 < split_prompts(apart)


def test_ranks_take_the_longer_rows_in_turn():
    shares = [0, 0]
    for rank in range(2):
        sampler = WindowSampler(LENGTHS[:48], batch_size=2, accumulation=4, world_size=2, rank=rank)
        shares[rank] = sum(max(LENGTHS[row] for row in batch) for batch in sampler)
    assert abs(shares[0] - shares[1]) < 0.1 * sum(shares)
