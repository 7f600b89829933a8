"""The gather plan: it lists exactly the scored tokens, and each points at the hidden state that predicts it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from prefopt.data.collation import Collator, row_length


def pair(seed: int, index: int = 0, **columns: float) -> dict:
    rng = random.Random(seed)
    prompt, chosen, rejected = ([rng.randint(10, 99) for _ in range(rng.randint(1, 9))] for _ in range(3))
    return {
        "example_id": str(seed),
        "row": index,
        "prompt_ids": np.array(prompt, dtype=np.int32),
        "chosen_ids": np.array(chosen, dtype=np.int32),
        "rejected_ids": np.array(rejected, dtype=np.int32),
        "chosen_scored": np.ones(len(chosen), dtype=bool),
        "rejected_scored": np.array([rng.random() < 0.7 for _ in rejected]),
        "columns": columns,
    }


def single(seed: int, desirable: bool, **columns: float) -> dict:
    row = pair(seed, seed, **columns)
    return {
        "example_id": row["example_id"],
        "row": seed,
        "prompt_ids": row["prompt_ids"],
        "completion_ids": row["chosen_ids"],
        "completion_scored": row["chosen_scored"],
        "desirable": desirable,
        "columns": columns,
    }


def expected_tokens(row: dict) -> list[list[int]]:
    return [row[f"{side}_ids"][row[f"{side}_scored"]].tolist() for side in ("chosen", "rejected")]


def test_targets_are_the_scored_tokens_and_sources_come_just_before():
    rows = [pair(seed, seed) for seed in range(5)]
    batch = Collator(pad_token_id=7)(rows)
    sides = [expected_tokens(row) for row in rows]
    expected = [tokens for side in range(2) for tokens in (both[side] for both in sides)]
    assert batch["target"].tolist() == [token for tokens in expected for token in tokens]
    assert batch["sequence"].tolist() == [index for index, tokens in enumerate(expected) for _ in tokens]
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["source"] + 1], batch["target"])
    assert batch["attention_mask"].flatten()[batch["source"] + 1].all()


def with_target(seed: int) -> dict:
    row, other = pair(seed, seed), pair(seed + 50)
    return {**row, "target_ids": other["rejected_ids"], "target_scored": other["rejected_scored"]}


def test_targets_come_last_and_only_where_they_are_read():
    rows = [with_target(seed) for seed in range(4)]
    plain, batch = Collator()(rows), Collator(targets=True)(rows)
    assert (plain["size"], plain["target_size"], plain["target_tokens"]) == (8, 0, 0)
    assert (batch["size"], batch["target_size"]) == (12, 4)
    scored = [row["target_ids"][row["target_scored"]].tolist() for row in rows]
    assert batch["target_tokens"] == sum(map(len, scored))
    tokens = len(batch["target"]) - batch["target_tokens"]
    assert batch["target"][:tokens].tolist() == plain["target"].tolist()
    assert batch["target"][tokens:].tolist() == [token for tokens in scored for token in tokens]
    assert batch["sequence"][tokens:].tolist() == [8 + row for row in range(4) for _ in scored[row]]
    assert torch.equal(batch["input_ids"].flatten()[batch["source"] + 1], batch["target"])
    assert batch["tokens"] == sum(row_length(row) for row in rows) == batch["attention_mask"].sum()
    assert Collator(targets=True)([])["target_size"] == 0


def test_sides_are_slices():
    rows = [pair(seed) for seed in range(4)]
    batch = Collator()(rows)
    assert (batch["size"], batch["desirable_size"]) == (8, 4)
    assert batch["desirable_tokens"] == sum(int(row["chosen_scored"].sum()) for row in rows)
    assert (batch["sequence"][: batch["desirable_tokens"]] < 4).all()
    assert batch["tokens"] == sum(map(row_length, rows)) == int(batch["attention_mask"].sum())


def test_the_rejected_answers_are_left_out_when_no_loss_reads_them():
    batch = Collator(all_completions=False)([pair(seed) for seed in range(3)])
    assert batch["input_ids"].shape[0] == batch["size"] == batch["desirable_size"] == 3
    assert len(batch["target"]) == batch["desirable_tokens"]
    assert batch["tokens"] == sum(row_length(pair(seed), rejected=False) for seed in range(3))


def test_single_completions_come_desirable_first_with_their_columns():
    rows = [single(seed, desirable=seed % 2 == 1, margin=float(seed)) for seed in range(5)]
    batch = Collator(paired=False, columns=("margin",))(rows)
    assert batch["row"].tolist() == [1, 3, 0, 2, 4]
    assert batch["columns"]["margin"].tolist() == [1.0, 3.0, 0.0, 2.0, 4.0]
    assert (batch["size"], batch["desirable_size"]) == (5, 2)


@pytest.mark.parametrize("paired", [True, False])
def test_no_rows_give_one_unscored_row(paired):
    batch = Collator(pad_token_id=3, paired=paired, columns=("margin",))([])
    assert batch["input_ids"].tolist() == [[3]]
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["source"].shape == batch["target"].shape == batch["sequence"].shape == (0,)
    assert (batch["size"], batch["tokens"], batch["columns"]["margin"].shape) == (0, 0, (0,))


def test_padding_is_to_the_right_and_to_the_multiple_asked_for():
    batch = Collator(pad_token_id=0, pad_to_multiple_of=16)([pair(1), pair(2)])
    assert batch["input_ids"].shape[1] % 16 == 0
    mask = batch["attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


def test_the_end_token_is_scored_even_when_it_is_the_pad_token():
    row = pair(4)
    row["chosen_ids"][-1] = 2
    batch = Collator(pad_token_id=2)([row])
    assert batch["target"][batch["desirable_tokens"] - 1] == 2
