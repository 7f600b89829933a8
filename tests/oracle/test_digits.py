"""Losses against fifty-digit arithmetic: a committed table of values, and inputs where digits are easily lost.

`python -m tests.oracle.test_digits` writes the table anew, which only a change of a formula or a case can ask for.
"""

from __future__ import annotations

import inspect
import json
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch

from prefopt.losses import make
from tests.oracle import float64
from tests.oracle.float64 import Answer, Pair
from tests.oracle.rows import Rows, answers_of, as_micro, loss_and_gradient, mismatched_rows, only, targets_of
from tests.oracle.test_formulas import CASES, Case, every_case

TABLE = Path(__file__).with_name("table.json")
# A formula beside the tests of its loss is held to fifty digits by the last test here.
TABLED = [case for case in CASES if case.name in float64.FORMULAS]
SMALL_TO_LARGE = [-1e-8, -1e-4, -1.0, -50.0, -1e4]


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def exact(case: Case, rows: Rows) -> list[Any]:
    """Values of the formula in mpmath's precision; the doubles that go in are taken as they are."""

    def numbers(values: Any) -> list[Any]:
        return [mpmath.mpf(value) for value in values]

    def answer(given: Answer) -> Answer:
        return Answer(numbers(given.policy), numbers(given.reference), kl=given.kl and numbers(given.kl))

    targets = [answer(target) for target in targets_of(rows, case.columns)]
    pairs = [
        Pair(
            answer(row.chosen),
            answer(row.rejected),
            {name: mpmath.mpf(value) for name, value in only(row.columns, case.columns).items()},
            target,
        )
        for row, target in zip_longest(rows, targets)
    ]
    mismatched = [answer(other) for other in answers_of(mismatched_rows())]
    return float64.values(case.name, pairs, mismatched, **exact_knobs(case))


def exact_knobs(case: Case) -> dict[str, Any]:
    parameters = inspect.signature(float64.formula(case.name)).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty}
    knobs = {**usual, **case.knobs}
    return {name: mpmath.mpf(value) if isinstance(value, float) else value for name, value in knobs.items()}


def points() -> Rows:
    """Twenty-five pairs, every combination of five ways in which policy and reference may stand to each other."""
    answers = [
        Answer([-0.25, -1.5], [-0.25, -1.5], kl=[0.0, 0.0]),
        Answer([-0.125, -3.5, -0.75], [-0.5, -2.25, -2.0], kl=[0.25, 1.5, 0.125]),
        Answer([-9.0], [-2.5], kl=[3.0]),
        Answer([-30.0, -45.5, -12.25, -0.0625], [-6.0, -3.5, -1.25, -0.5], kl=[20.0, 18.25, 6.5, 0.75]),
        Answer([-0.001, -0.002], [-11.0, -21.0], kl=[9.0, 12.5]),
    ]
    scores = [(2.0, 0.5), (3.25, 3.0), (1.5, 1.5), (7.0, 1.0), (0.75, 0.25)]
    rows = []
    for index, (chosen, rejected) in enumerate(product(answers, repeat=2)):
        won, lost = scores[index % len(scores)]
        columns = {"preference": index / 24, "score_chosen": won, "score_rejected": lost, "offset": index / 8 - 1.5}
        rows.append(Pair(chosen, rejected, columns))
    return rows


def table() -> dict[str, list[str]]:
    with mpmath.workdps(50):
        return {case.label: [mpmath.nstr(value, 17) for value in exact(case, points())] for case in TABLED}


def test_the_formulas_give_the_committed_table():
    committed, found = json.loads(TABLE.read_text()), table()
    assert found.keys() == committed.keys()
    for label, values in committed.items():
        assert [float(value) for value in found[label]] == pytest.approx(list(map(float, values)), rel=1e-15), label


@pytest.mark.parametrize("case", TABLED, ids=lambda case: case.label)
def test_a_loss_gives_the_committed_table(case: Case):
    values, _ = loss_and_gradient(make(case.name, **case.knobs), as_micro(points(), case.columns))
    committed = [float(value) for value in json.loads(TABLE.read_text())[case.label]]
    assert values.tolist() == pytest.approx(committed, rel=1e-10, abs=1e-13)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_digits_are_lost_between_tiny_and_huge(case: Case, dtype: torch.dtype):
    """One log-probability from -1e-8 to -1e4 in each of the four places: five digits of fifty, finite gradients."""
    certain, columns = Answer([0.0], [0.0]), points()[0].columns
    rows = []
    for size in torch.tensor(SMALL_TO_LARGE, dtype=dtype).tolist():
        if abs(size) <= case.bound:
            for answer in (Answer([size], [0.0]), Answer([0.0], [size])):
                rows += [Pair(answer, certain, columns), Pair(certain, answer, columns)]
    values, gradient = loss_and_gradient(make(case.name, **case.knobs), as_micro(rows, case.columns, dtype))
    assert values.tolist() == pytest.approx([float(value) for value in exact(case, rows)], rel=1e-5, abs=1e-25)
    assert gradient.isfinite().all()


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
