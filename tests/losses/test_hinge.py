"""Hinge: a constant slope up to the margin, none beyond, and its kin."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, gradients, metrics, spelled, values
from tests.losses.views import run

FACTS = Facts(at_the_reference=1.0)

CHOSEN, REJECTED = zip(*RATIOS, strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_is_what_the_margin_lacks(beta, dtype, tolerance):
    found = values(make("hinge", beta=beta), CHOSEN, REJECTED, dtype)
    for value, (a, b) in zip(found.tolist(), RATIOS, strict=True):
        assert value == pytest.approx(max(0.0, 1 - beta * (a - b)), rel=tolerance)


def test_a_value_by_hand():
    """beta 0.05: 1 - 0.05 * 6 = 0.7; a margin of 20 nats is enough."""
    assert values(make("hinge"), [5.0, 19.0, 21.0], [-1.0, -1.0, -1.0]).tolist() == pytest.approx(
        [0.7, 0, 0], abs=1e-15
    )


def test_the_slope_is_beta_below_the_margin_and_nothing_from_there_on():
    loss = make("hinge", beta=0.25)
    chosen, rejected = gradients(loss, [-1e4, 0.0, 3.9, 4.0, 4.1, 1e4], [0.0] * 6)
    assert chosen == [-0.25, -0.25, -0.25, 0.0, 0.0, 0.0]
    assert rejected == [-slope for slope in chosen]


def test_hopeless_pairs_pull_as_in_dpo():
    hinge, dpo = (gradients(make(name, beta=0.5), [-300.0], [0.0]) for name in ("hinge", "dpo"))
    assert hinge[0] == pytest.approx(dpo[0], rel=1e-12) and hinge[1] == pytest.approx(dpo[1], rel=1e-12)


def test_is_slics_hinge_measured_from_the_reference():
    """Under a reference that gives both answers the same: beta times a hinge with the margin 1 / beta."""
    micro = spelled([[-3.0], [-1.0]], [[-2.0], [-9.0]], reference=-2.0)
    plain = run(make("slic", delta=4.0, target_weight=0), micro).loss
    torch.testing.assert_close(run(make("hinge", beta=0.25), micro).loss, 0.25 * plain, rtol=1e-15, atol=0)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `hinge` takes a number above 0, not"):
        make("hinge", beta=value)


def test_metrics_and_defaults():
    assert make("hinge").beta == 0.05
    found = metrics(make("hinge", beta=0.5), [3.0, 2.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0])
    assert found["margin_met"] == [1.0, 1.0, 0.0, 0.0]
    assert found["rewards/chosen"] == [1.5, 1.0, 0.5, -0.5]
    assert found["rewards/rejected"] == [0.0, 0.0, 0.0, 2.0]
