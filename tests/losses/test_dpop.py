"""DPOP: DPO above the reference, a steeper chosen side below it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, exact, gradients, metrics, sigmoid, values

FACTS = Facts(at_the_reference=math.log(2), more_than_the_margin=True)

CHOSEN, REJECTED = zip(*RATIOS, strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("beta", "penalty"), [(0.1, 5.0), (0.3, 50.0)])
def test_agrees_with_exact_arithmetic(beta, penalty, dtype, tolerance):
    found = values(make("dpop", beta=beta, penalty=penalty), CHOSEN, REJECTED, dtype)
    for value, (a, b) in zip(found.tolist(), RATIOS, strict=True):
        assert value == pytest.approx(exact(beta * (a - b - penalty * max(0.0, -a))), rel=tolerance, abs=1e-30)


def test_a_value_by_hand():
    """beta 0.5, penalty 3, a = -2, b = -4: the argument is 0.5 (2 - 6) = -2, so log(1 + e^2)."""
    assert values(make("dpop", beta=0.5, penalty=3), [-2.0], [-4.0]).item() == pytest.approx(2.1269280110, rel=1e-9)


def test_at_or_above_the_reference_it_is_dpo_to_the_last_bit():
    a, b = [0.0, 0.5, 30.0], [2.0, -0.5, 29.0]
    assert torch.equal(values(make("dpop"), a, b), values(make("dpo"), a, b))
    assert gradients(make("dpop"), a, b) == gradients(make("dpo"), a, b)


def test_without_a_penalty_it_is_dpo_to_the_last_bit():
    assert torch.equal(values(make("dpop", penalty=0), CHOSEN, REJECTED), values(make("dpo"), CHOSEN, REJECTED))


def test_a_first_step_is_dpos():
    """Every pair starts on the kink."""
    assert gradients(make("dpop", penalty=50), [0.0], [0.0]) == gradients(make("dpo"), [0.0], [0.0])


@pytest.mark.parametrize("penalty", [0.5, 5.0, 50.0])
def test_below_the_reference_the_chosen_answer_weighs_one_and_the_penalty(penalty):
    (chosen,), (rejected,) = gradients(make("dpop", beta=0.1, penalty=penalty), [-0.7], [0.2])
    assert rejected == pytest.approx(0.1 * sigmoid(0.1 * (0.9 + penalty * 0.7)), rel=1e-12)
    assert chosen == pytest.approx(-(1 + penalty) * rejected, rel=1e-12)


def test_is_nowhere_below_dpo_and_grows_with_the_penalty():
    a = [-8.0, -2.0, -0.1, 0.0, 3.0]
    found = [values(make("dpop", penalty=penalty), a, [-3.0] * 5) for penalty in (0, 1, 5, 50)]
    for less, more in itertools.pairwise(found):
        assert (more >= less).all()
        assert ((more > less) == torch.tensor([True, True, True, False, False])).all()


def test_never_grows_with_the_chosen_likelihood():
    chosen, _ = gradients(make("dpop"), [-200.0, -2.0, -0.1, 0.0, 0.1, 40.0], [1.0] * 6)
    assert all(slope < 0 for slope in chosen)


def test_raising_both_answers_from_below_lowers_the_loss_where_dpo_is_indifferent():
    both = [-4.0, -2.0, -1.0]
    lower = [a - 3.0 for a in both]
    assert (values(make("dpop"), both, lower).diff() < 0).all()
    assert torch.equal(values(make("dpo"), both, lower), values(make("dpo"), [0.0] * 3, [-3.0] * 3))


@pytest.mark.parametrize("penalty", [1.5, 20.0])
def test_the_optimum_keeps_the_chosen_answer_at_the_reference(penalty):
    """Where widening the margin costs chosen likelihood nat for nat (a = -x, b = -2 x), DPO goes on without end."""
    x = [-0.5, -0.01, 0.0, 0.01, 0.5, 4.0]
    sides = [-step for step in x], [-2 * step for step in x]
    assert values(make("dpop", penalty=penalty), *sides).argmin().item() == 2
    assert values(make("dpo"), *sides).argmin().item() == 5


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_penalty_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.penalty: `dpop` takes a number at least 0, not"):
        make("dpop", penalty=value)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `dpop` takes a number above 0, not"):
        make("dpop", beta=value)


def test_the_default_penalty_is_announced_as_not_the_papers():
    assert make("dpop").notes() == ("dpop: penalty is 5, the paper has 50 (with beta 0.3)",)
    assert make("dpop", penalty=50).notes() == ()


def test_metrics_and_defaults():
    assert (make("dpop").beta, make("dpop").penalty) == (0.1, 5.0)
    found = metrics(make("dpop", beta=0.5), [-0.5, 0.0, 2.0], [1.0, 1.0, 1.0])
    assert found["chosen_below_reference"] == [1.0, 0.0, 0.0]
    assert found["rewards/chosen"] == [-0.25, 0.0, 1.0]
    assert found["rewards/rejected"] == [0.5, 0.5, 0.5]
