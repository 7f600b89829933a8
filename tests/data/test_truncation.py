"""Rows beyond the limit: exact ids for each policy, and no row lost without a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefopt.data.truncation import (
    ANSWER_CUT,
    NO_SIGNAL,
    PROMPT_TOO_LONG,
    TOO_LONG,
    Answer,
    Fitted,
    LengthPolicy,
    TokenReport,
    fit,
)
from prefopt.errors import DataError, UserError

EOS = 99


def answer(*ids: int, scored: list[bool] | None = None) -> Answer:
    flags = [True] * len(ids) if scored is None else scored
    return Answer(np.array(ids, dtype=np.int32), np.array(flags, dtype=bool))


def run(prompt: list[int], answers: list[Answer], bos: int | None = None, **settings) -> Fitted:
    return fit(np.array(prompt, dtype=np.int32), tuple(answers), LengthPolicy(**settings), bos_token_id=bos)


def ids(fitted: Fitted) -> tuple[list[int], list[list[int]]]:
    return fitted.prompt.tolist(), [answer.ids.tolist() for answer in fitted.answers]


def test_rows_within_the_limit_are_left_alone():
    for limit in (None, 8):
        fitted = run([1, 2, 3], [answer(10, 11, EOS), answer(20, 21, 22, 23, EOS)], max_length=limit)
        assert ids(fitted) == ([1, 2, 3], [[10, 11, EOS], [20, 21, 22, 23, EOS]])
        assert (fitted.cut, fitted.prompt_cut, fitted.reason) == ((False, False), False, None)


def test_each_mode_gives_the_listed_ids():
    prompt = list(range(1, 31))
    chosen, rejected = answer(*range(50, 59), EOS), answer(70, 71, EOS)
    start = run(prompt, [chosen, rejected], max_length=35)
    assert ids(start) == (prompt, [[50, 51, 52, 53, 54], [70, 71, EOS]])
    assert start.cut == (True, False)
    end = run(prompt, [chosen, rejected], max_length=35, truncation_mode="keep_end")
    assert ids(end) == (list(range(6, 31)), [[*range(50, 59), EOS], [70, 71, EOS]])
    assert end.prompt_cut and end.cut == (False, False)
    assert run(prompt, [chosen, rejected], max_length=35, truncation_mode="drop").reason == TOO_LONG


def test_keep_end_removes_only_what_it_must_and_keeps_the_bos():
    prompt, one = list(range(1, 31)), answer(50, 51, 52, 53, EOS)
    plain = run(prompt, [one], max_length=32, truncation_mode="keep_end")
    assert ids(plain) == (list(range(4, 31)), [[50, 51, 52, 53, EOS]])
    with_bos = run(prompt, [one], bos=1, max_length=32, truncation_mode="keep_end")
    assert with_bos.prompt.tolist() == [1, *range(5, 31)]


def test_keep_end_leaves_the_smallest_prompt_asked_for_then_cuts_the_answer():
    prompt, long = list(range(1, 31)), answer(*range(50, 89), EOS)
    fitted = run(prompt, [long], bos=1, max_length=20, truncation_mode="keep_end", min_prompt_tokens=4)
    assert ids(fitted) == ([1, 28, 29, 30], [list(range(50, 66))])
    assert fitted.cut == (True,) and fitted.prompt_cut
    short_prompt = run([1, 2], [long], max_length=20, truncation_mode="keep_end", min_prompt_tokens=4)
    assert ids(short_prompt) == ([1, 2], [list(range(50, 68))])


def test_answers_that_lose_their_end_marker():
    prompt, answers = [1, 2, 3, 4], [answer(10, 11, 12, 13, 14, EOS), answer(20, 21, EOS)]
    keep = run(prompt, answers, max_length=8)
    assert ids(keep)[1] == [[10, 11, 12, 13], [20, 21, EOS]] and keep.cut == (True, False)
    assert run(prompt, answers, max_length=8, cut_answers="drop").reason == ANSWER_CUT
    same = run(prompt, answers, max_length=8, cut_answers="same_length")
    assert ids(same)[1] == [[10, 11], [20, 21]] and same.cut == (True, True)
    uncut = run(prompt, answers, max_length=10, cut_answers="same_length")
    assert ids(uncut)[1] == [[10, 11, 12, 13, 14, EOS], [20, 21, EOS]]
    assert ids(run(prompt, answers[:1], max_length=8, cut_answers="same_length"))[1] == [[10, 11, 12, 13]]


def test_a_long_target_is_cut_by_itself():
    """Only the two answers that are compared must not differ in their ends."""
    pair = [answer(1, 2, EOS), answer(3, EOS)]
    found = run([7, 7], [*pair, answer(4, 5, 6, 8, EOS)], max_length=5, cut_answers="same_length")
    assert ids(found) == ([7, 7], [[1, 2, EOS], [3, EOS], [4, 5, 6]])
    assert found.cut == (False, False, True)
    long = [answer(1, 2, 4, EOS), answer(3, EOS)]
    found = run([7, 7], [*long, answer(4, 5, EOS)], max_length=5, cut_answers="same_length")
    assert ids(found) == ([7, 7], [[1], [3], [4, 5, EOS]])
    assert found.cut == (True, True, False)
    assert run([7, 7], [*pair, answer(4, 5, 6, 8)], max_length=5, cut_answers="drop").reason == ANSWER_CUT


@pytest.mark.parametrize("length", [8, 9, 20])
def test_a_prompt_that_fills_the_limit_has_no_room_for_an_answer(length):
    fitted = run(list(range(length)), [answer(50, EOS), answer(60, EOS)], max_length=8)
    assert fitted.reason == PROMPT_TOO_LONG


def test_pairs_that_are_equal_once_cut_have_no_signal():
    assert run([1, 2, 3], [answer(10, 11, EOS), answer(10, 12, EOS)], max_length=4).reason == NO_SIGNAL


def test_an_answer_of_which_nothing_scored_is_left_has_no_signal():
    header_first = answer(10, 11, 12, 13, scored=[False, False, True, True])
    assert run([1], [header_first, answer(20, 21)], max_length=3).reason == NO_SIGNAL
    assert run([1], [header_first], max_length=4).reason is None


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_short_rows_beside_long_ones_keep_scored_tokens(mode):
    for prompt, size in ((1, 2), (50, 10), (20, 40), (3, 57)):
        fitted = run(
            list(range(prompt)),
            [answer(*range(100, 100 + size))],
            max_length=16,
            truncation_mode=mode,
            min_prompt_tokens=8,
        )
        assert fitted.reason is not None or fitted.answers[0].scored.any()
        assert fitted.reason is not None or len(fitted.prompt) + len(fitted.answers[0].ids) <= 16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_length": 1}, "max_length"),
        ({"truncation_mode": "keepstart"}, "keep_start"),
        ({"cut_answers": "both"}, "cut_answers"),
        ({"min_prompt_tokens": 0}, "min_prompt_tokens"),
        ({"truncation_mode": "keep_end", "max_length": 16, "min_prompt_tokens": 16}, "min_prompt_tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        LengthPolicy(**settings)


def test_the_report_refuses_above_the_share_and_says_why():
    report = TokenReport(examples=200)
    report.drop(PROMPT_TOO_LONG, "a.jsonl:7 (prompt 90 tokens)")
    report.drop(NO_SIGNAL, "a.jsonl:9")
    report.refuse(0.01)
    report.drop(TOO_LONG, "a.jsonl:11")
    with pytest.raises(DataError) as caught:
        report.refuse(0.01)
    for word in ("3 of 200", "prompt_too_long: 1", "a.jsonl:7 (prompt 90 tokens)", "max_length", "max_dropped: 1.0"):
        assert word in str(caught.value)
    report.refuse(1.0)


def test_the_report_counts_all_rows_but_names_a_few():
    report = TokenReport(examples=100)
    for line in range(20):
        report.drop("identical_after_tokenising", f"a.jsonl:{line}")
    report.refuse(0.0)  # pairs without a difference are no loss to the length limit
    row = {"prompt_ids": np.zeros(3), "completion_ids": np.zeros(4), "completion_scored": np.ones(4, dtype=bool)}
    report.measure([row] * 80)
    told = json.loads(json.dumps(report.as_dict()))
    assert told["dropped"]["identical_after_tokenising"]["count"] == 20
    assert len(told["dropped"]["identical_after_tokenising"]["places"]) == 5
    assert told["tokens"] == {"prompt": 240, "completion": 320, "scored": 320, "plain": 560, "shared": 560}
    assert told["lengths"]["row"] == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert any("identical_after_tokenising: 20" in line for line in report.lines())


def test_nothing_left_is_refused_whatever_the_share():
    report = TokenReport(examples=2)
    report.drop("identical_after_tokenising", "a.jsonl:1")
    report.drop("identical_after_tokenising", "a.jsonl:2")
    with pytest.raises(DataError, match="nothing to learn"):
        report.refuse(1.0)
