"""Rows in which answers share their prompt: each answer is still the prompt followed by itself, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefopt.data.collation import Batch, Collator, row_width
from tests.data.test_collation import pair, single

PLAIN, SHARED = Collator(pad_token_id=7), Collator(pad_token_id=7, shared=True)


def like(row: dict, other: dict) -> dict:
    """The row with the other one's prompt."""
    return {**row, "prompt_ids": other["prompt_ids"]}


def paths(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """For each scored token what the model has read before it, up to its source, and its target."""
    width = batch["input_ids"].shape[1]
    found = []
    for source, target in zip(batch["source"].tolist(), batch["target"].tolist(), strict=True):
        row, place = divmod(source, width)
        ids = batch["input_ids"][row, : place + 1]
        if "branch" in batch:
            branch = batch["branch"][row, : place + 1]
            ids = ids[(branch == 0) | (branch == branch[place])]
        found.append(([*ids.tolist()], target))
    return found


def test_every_scored_token_has_the_same_past_in_both_layouts():
    rows = [pair(seed, seed) for seed in range(6)]
    rows[4] = like(rows[4], rows[1])
    plain, shared = PLAIN(rows), SHARED(rows)
    assert shared["input_ids"].shape[0] < plain["input_ids"].shape[0]
    assert paths(shared) == paths(plain)
    for name in ("target", "sequence", "row"):
        assert torch.equal(shared[name], plain[name])
    for name in ("size", "desirable_size", "desirable_tokens", "tokens"):
        assert shared[name] == plain[name]


def test_positions_go_on_from_the_end_of_the_prompt():
    batch = SHARED([pair(seed) for seed in range(4)])
    for branch, positions in zip(batch["branch"], batch["position_ids"], strict=True):
        for number in range(1, int(branch.max()) + 1):
            path = positions[(branch == 0) | (branch == number)]
            assert path.tolist() == list(range(len(path)))
        assert not positions[branch < 0].any()


def test_a_prompt_is_there_once_however_many_rows_have_it():
    first = pair(3)
    rows = [first, *(like(pair(seed, seed), first) for seed in (4, 5))]
    batch = SHARED(rows)
    assert batch["input_ids"].shape[0] == 1 and int(batch["branch"].max()) == 6
    answers = sum(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
    assert batch["reading"]["unique_tokens"] == (len(first["prompt_ids"]) + answers, 3)


def test_labelled_answers_of_one_prompt_share_it():
    rows = [like(single(seed, desirable=seed % 2 == 0), pair(9)) for seed in range(4)]
    shared, plain = (Collator(paired=False, shared=way)(rows) for way in (True, False))
    assert shared["input_ids"].shape[0] == 1
    assert paths(shared) == paths(plain) and torch.equal(shared["sequence"], plain["sequence"])


def test_rows_are_no_longer_than_it_pays():
    """One long tree would pad many short rows to its length: its answers are spread over two rows instead."""
    long = pair(1)
    long |= {
        f"{side}_{part}": array
        for side in ("chosen", "rejected")
        for part, array in (("ids", np.arange(40, dtype=np.int32)), ("scored", np.ones(40, dtype=bool)))
    }
    short = [pair(seed, seed) for seed in range(2, 8)]
    alone, among = SHARED([long]), SHARED([long, *short])
    assert alone["input_ids"].shape == (1, row_width(long, shared=True))
    assert among["input_ids"].shape == (8, row_width(long, shared=False))
    assert paths(among) == paths(PLAIN([long, *short]))


def test_rows_with_nothing_in_common_are_plain():
    rows = [pair(seed, seed) for seed in range(3)]
    batches = [Collator(all_completions=False, shared=way)(rows) for way in (True, False)]
    assert "branch" not in batches[0]
    for name in ("input_ids", "attention_mask", "source", "target"):
        assert torch.equal(batches[0][name], batches[1][name])


@pytest.mark.parametrize("collator", [PLAIN, SHARED])
def test_no_rows_and_empty_prompts(collator):
    assert collator([])["attention_mask"].tolist() == [[1]]
    bare = pair(1)
    bare["prompt_ids"] = bare["prompt_ids"][:0]
    bare["chosen_scored"][0] = bare["rejected_scored"][0] = False  # nothing predicts a first token
    batch = collator([bare, pair(2)])
    assert paths(batch) == paths(PLAIN([bare, pair(2)]))


@pytest.mark.parametrize("collator", [PLAIN, SHARED])
def test_padding_is_counted(collator):
    batch = collator([pair(seed) for seed in range(4)])
    held = batch["branch"] >= 0 if "branch" in batch else batch["attention_mask"] > 0
    total = batch["input_ids"].numel()
    assert batch["reading"]["padding"] == (total - int(held.sum()), total)
    assert batch["reading"]["unique_tokens"] == (int(held.sum()), 4)
    assert (batch["input_ids"][~held] == 7).all()


def test_the_widths_that_rows_are_grouped_by_are_those_of_their_rows():
    rows = [pair(seed) for seed in range(5)]
    for shared, collator in ((False, PLAIN), (True, SHARED)):
        assert [collator([row])["input_ids"].shape[1] for row in rows] == [row_width(r, shared=shared) for r in rows]
