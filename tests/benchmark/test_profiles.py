"""Lengths, the steps that stand for an epoch, and the rows made from them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefopt.benchmark.profiles import MAX_LENGTH, NAMES, load, made_up, token_rows, windows


@pytest.mark.parametrize("name", NAMES)
def test_without_its_file_a_profile_has_the_means_of_the_real_one(name, tmp_path):
    profile = load(name, tmp_path)
    assert profile.source == "log-normal"
    expected = {"hh": (126, 42, 53), "judged": (40, 478, 227)}[name]
    np.testing.assert_allclose(profile.lengths.mean(0), expected, rtol=0.05)


def test_lengths_of_a_file_are_read_as_they_are(tmp_path):
    (tmp_path / "hh_lengths.json").write_text(json.dumps({"lengths": [[5, 2, 3], [900, 200, 10]]}))
    assert load("hh", tmp_path).lengths.tolist() == [[5, 2, 3], [900, 124, 10]]


def test_texts_are_counted_in_tokens(tmp_path):
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": turn("user", "hello"), "chosen": turn("assistant", "hello hello hello"), "rejected": turn("a", "x")}
    ] * 3
    (tmp_path / "judged_pairs_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (prompt, chosen, rejected), *_ = load("judged", tmp_path).lengths.tolist()
    assert prompt == 1 and rejected == 2  # the letter and the end
    assert 2 < chosen <= 7


def test_no_row_is_longer_than_the_limit():
    lengths = made_up("long", (900, 900, 900), (1.0, 1.0, 1.0)).lengths
    assert (lengths[:, :1] + lengths[:, 1:]).max() == MAX_LENGTH
    assert lengths.min() >= 1


@pytest.mark.parametrize("grouped", [True, False])
def test_a_few_steps_cost_what_an_epoch_costs_on_average(grouped, tmp_path):
    profile = load("hh", tmp_path)

    def padded(steps: list[np.ndarray]) -> float:
        longest = [(profile.lengths[step, 0] + profile.lengths[step, 1:].max(1)).max() for step in steps]
        return float(np.mean(longest))

    few, all_of_them = (windows(profile, batch_size=8, count=count, grouped=grouped) for count in (4, 250))
    assert len(all_of_them) == len(profile.lengths) // 8
    assert padded(few) == pytest.approx(padded(all_of_them), rel=0.03)
    assert all(len(step) == 8 for step in few)


def test_grouping_saves_padding(tmp_path):
    profile = load("hh", tmp_path)
    longest = profile.lengths[:, 0] + profile.lengths[:, 1:].max(1)
    padded = {
        grouped: sum(longest[step].max() for step in windows(profile, batch_size=8, count=250, grouped=grouped))
        for grouped in (True, False)
    }
    assert padded[True] < 0.7 * padded[False]


def test_rows_have_the_lengths_asked_for_and_no_special_token():
    rows = token_rows(np.array([[3, 2, 4], [1, 1, 1]]), vocabulary=10)
    assert [len(rows[0][f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] == [3, 2, 4]
    assert rows[0]["rejected_scored"] == [1] * 4
    ids = [token for row in rows for part in ("prompt", "chosen", "rejected") for token in row[f"{part}_ids"]]
    assert min(ids) >= 3 and max(ids) < 10
    assert token_rows(np.array([[3, 2, 4]]), vocabulary=10) == rows[:1]
