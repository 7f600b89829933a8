"""Every loss against its formula: values and gradients, over its options, on random, extreme, equal and short rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from prefopt.losses import get, make, names
from tests.losses.facts import facts_of
from tests.losses.test_contract import demanded
from tests.losses.views import run
from tests.oracle import float64
from tests.oracle.rows import (
    Rows,
    answers_of,
    as_micro,
    as_tensors,
    equal_rows,
    extreme_rows,
    loss_and_gradient,
    mismatched_rows,
    one_token_rows,
    random_rows,
)

SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]
SCORES = ("score_chosen", "score_rejected")


class Case(NamedTuple):
    """A loss with knobs, on rows that have these columns; `bound` is the largest log-ratio it is exact at."""

    name: str
    knobs: dict[str, Any]
    columns: tuple[str, ...] = ()
    bound: float = 1e4

    @property
    def label(self) -> str:
        knobs = [f"{knob}={value}" for knob, value in self.knobs.items()]
        return "-".join([self.name, *knobs, *self.columns])


CASES = [
    Case("dpo", {}),
    Case("dpo", {"beta": 0.5}, ("preference",)),
    Case("dpo", {"beta": 0.01}),
    Case("cdpo", {}),
    Case("cdpo", {"label_smoothing": 0.0}),
    Case("cdpo", {"beta": 0.7, "label_smoothing": 0.49}),
    Case("rdpo", {}),
    Case("rdpo", {"label_smoothing": 0.0}),
    Case("rdpo", {"beta": 0.7, "label_smoothing": 0.4}),
    Case("ipo", {}),
    Case("ipo", {"beta": 0.5}, ("preference",)),
    Case("ipo", {"length": "sum"}),
    Case("ipo", {"length": "sum", "beta": 0.01}, ("preference",)),
    Case("hinge", {}),
    Case("hinge", {"beta": 1.0}),
    Case("slic", {}),
    Case("slic", {"delta": 0.0, "target_weight": 0.0}),
    Case("slic", {"delta": 2.5, "target_weight": 3.0, "target_length": "mean"}),
    Case("slic", {}, ("target",)),
    Case("slic", {"delta": 2.5, "target_weight": 3.0, "target_length": "mean"}, ("target",)),
    Case("dpop", {}),
    Case("dpop", {"beta": 0.3, "penalty": 50.0}),
    Case("dpop", {"penalty": 0.0}),
    Case("simpo", {}),
    Case("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.3}),
    Case("simpo", {"beta": 2.5, "gamma": 1.6}),
    Case("simpo", {"gamma": 0.0}),
    Case("simpo", {"gamma_beta_ratio": 0.0}),
    Case("odpo", {}, SCORES),
    Case("odpo", {"beta": 0.7, "alpha": 0.5, "f": "log"}, SCORES),
    Case("odpo", {"f": "identity"}, SCORES),
    Case("odpo", {"f": "log_ratio", "alpha": 2.0}, SCORES),
    Case("odpo", {"alpha": 0.0}, SCORES),
    Case("odpo", {"beta": 0.5}, ("offset",)),
    Case("fdpo", {}),
    Case("fdpo", {"divergence": "js", "beta": 0.5}),
    Case("fdpo", {"divergence": "forward_kl"}, bound=300.0),
    Case("fdpo", {"divergence": "alpha"}, bound=300.0),
    Case("fdpo", {"divergence": "alpha", "alpha": 0.3}, bound=300.0),
    Case("fdpo", {"divergence": "alpha", "alpha": 0.7}, bound=300.0),
    Case("fdpo", {"divergence": "reverse_kl"}),
    Case("tdpo1", {}),
    Case("tdpo1", {"beta": 0.7}),
    Case("tdpo2", {}),
    Case("tdpo2", {"beta": 0.7, "alpha": 2.0}),
    Case("tdpo2", {"alpha": 0.0}),
    Case("sft", {}),
    Case("kto", {}),
    Case("kto", {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.7}),
    Case("kto", {"z0": "zero"}),
]

NAMED = {case.name for case in CASES}
# Losses whose formula stands in their own test file.
CASES += [
    Case(name, dict(knobs), demanded(make(name, **knobs)))
    for name in SHIPPED
    if name not in NAMED and facts_of(name).formula is not None
    for knobs in ({}, *facts_of(name).knobs)
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def rows_of(kind: str, case: Case) -> Rows:
    return {
        "random": lambda: random_rows(24, seed=1),
        "weighted": lambda: random_rows(12, seed=2, weighted=True),
        "extreme": lambda: extreme_rows(case.bound),
        "equal": equal_rows,
        "one token": one_token_rows,
    }[kind]()


def expected(case: Case, rows: Rows, mismatched: Rows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradients of the formula."""
    pairs, leaves = as_tensors(rows, case.columns)
    others, _ = as_tensors(mismatched_rows() if mismatched is None else mismatched, ())
    values = torch.stack(float64.values(case.name, pairs, answers_of(others), **case.knobs))
    gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    return values.detach(), torch.cat(gradients)


def assert_close(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_loss_has_a_formula(name: str):
    assert name in {case.name for case in CASES} or facts_of(name).no_formula, (
        f"no formula for `{name}`: give FACTS in tests/losses/test_{name}.py the argument `formula`, written from the "
        "paper in the arithmetic of tests/oracle/float64.py; or `no_formula` with the reason"
    )


@every_case
@pytest.mark.parametrize("kind", ["random", "weighted", "extreme", "equal", "one token"])
def test_values_and_gradients(case: Case, kind: str):
    rows = rows_of(kind, case)
    loss = make(case.name, **case.knobs)
    assert_close(loss_and_gradient(loss, as_micro(rows, case.columns)), expected(case, rows), 1e-10)


@every_case
def test_float32_has_five_digits(case: Case):
    rows = rows_of("random", case)
    loss = make(case.name, **case.knobs)
    assert_close(loss_and_gradient(loss, as_micro(rows, case.columns, torch.float32)), expected(case, rows), 1e-5)


def logged(case: Case, beta: float | None, rows: Rows) -> dict[str, torch.Tensor]:
    """Rewards as the loss has them, log-probabilities and log-ratios summed; a tie is no hit."""
    pairs, _ = as_tensors(rows, ())
    metrics = {}
    for side in ("chosen", "rejected"):
        answers = [getattr(pair, side) for pair in pairs]
        rewards = [float64.reward(case.name, answer, **{**case.knobs, "beta": beta}) for answer in answers]
        metrics[f"rewards/{side}"] = torch.stack(rewards)
        metrics[f"logps/{side}"] = torch.stack([answer.lp for answer in answers])
        metrics[f"logratios/{side}"] = torch.stack([answer.ratio for answer in answers])
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics |= {"rewards/margins": margin, "rewards/accuracies": (margin > 0).double()}
    return {name: values.detach() for name, values in metrics.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "sft"], ids=lambda case: case.label)
def test_metrics(case: Case):
    loss, rows = make(case.name, **case.knobs), rows_of("random", case)
    found = run(loss, as_micro(rows, case.columns)).metrics
    expected = logged(case, getattr(loss, "beta", None), rows)
    assert ("logratios/chosen" in found) == (loss.needs.reference != "none")
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= set(found)
    common = expected.keys() & found.keys()
    assert_close([found[name] for name in common], [expected[name] for name in common], 1e-10)


@pytest.mark.parametrize("above", [True, False])
def test_the_reference_point_of_kto_is_clamped_after_the_mean(above: bool):
    case, rows, mismatched = (
        Case("kto", {"beta": 0.4}),
        rows_of("random", Case("kto", {})),
        mismatched_rows(above=above),
    )
    ratios = [answer.ratio for answer in answers_of(mismatched)]
    assert (sum(ratios) > 0) == above and min(ratios) < 0 < max(ratios)
    found = loss_and_gradient(make(case.name, **case.knobs), as_micro(rows, ()), mismatched)
    assert_close(found, expected(case, rows, mismatched), 1e-10)
    at_zero = loss_and_gradient(make(case.name, **case.knobs, z0="zero"), as_micro(rows, ()))
    assert torch.equal(found[0], at_zero[0]) == (not above)
