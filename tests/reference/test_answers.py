"""Which answers are scored together."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.reference.answers import Answer, batches_of

LENGTHS = (3, 9, 4, 9, 5, 2, 7, 1, 8, 6)


def answer(length: int) -> Answer:
    row = {"prompt_ids": np.zeros(1), "chosen_ids": np.zeros(length), "chosen_scored": np.ones(length)}
    return Answer(row, "chosen")


ANSWERS = {bytes([number]): answer(length) for number, length in enumerate(LENGTHS)}


def test_a_batch_holds_as_many_tokens_as_the_rows_of_the_longest():
    batches = batches_of(ANSWERS, 2, ANSWERS)
    assert sorted(id for batch in batches for id in batch) == sorted(ANSWERS)
    assert all(ANSWERS[batch[0]].tokens * len(batch) <= 2 * 10 for batch in batches)
    assert ANSWERS[batches[0][0]].tokens == 10


@pytest.mark.parametrize("killed_after", range(5))
def test_what_a_killed_run_left_is_scored_in_the_batches_it_would_have_had(killed_after):
    batches = batches_of(ANSWERS, 2, ANSWERS)
    left = {id for batch in batches[killed_after:] for id in batch}
    assert batches_of(ANSWERS, 2, left) == batches[killed_after:]


def test_answers_missing_here_and_there_are_put_together():
    missing = {batch[0] for batch in batches_of(ANSWERS, 2, ANSWERS) if len(batch) > 1}
    assert len(missing) > 2
    batches = batches_of(ANSWERS, 2, missing)
    assert sorted(id for batch in batches for id in batch) == sorted(missing)
    assert len(batches) < len(missing)
