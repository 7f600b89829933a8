"""f-DPO: its divergences against their formulas, their limits, and the optimum each one promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from prefopt.losses.functional import tamed_exp
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, Bandit, exact, gradients, metrics, sigmoid, values

FACTS = Facts(at_the_reference=math.log(2), more_than_the_margin=True, beside={"alpha": {"divergence": "alpha"}})

NEAR = [(-6.0, 3.0), (-1.5, 0.25), (0.0, 0.0), (1e-8, -1e-8), (0.7, -0.4), (6.0, 5.0), (30.0, -2.0)]
CHOSEN, REJECTED = zip(*NEAR, strict=True)

SLOPES = {
    "forward_kl": ({"divergence": "forward_kl"}, lambda x: 1 - math.exp(-x), lambda x: math.exp(-x)),
    "js": ({"divergence": "js"}, lambda x: math.log(2) - exact(x), lambda x: sigmoid(-x)),
    "alpha 0.5": ({"divergence": "alpha"}, lambda x: (1 - math.exp(-x / 2)) * 2, lambda x: math.exp(-x / 2)),
    "alpha 0.3": (
        {"divergence": "alpha", "alpha": 0.3},
        lambda x: (1 - math.exp(-0.3 * x)) / 0.3,
        lambda x: math.exp(-0.3 * x),
    ),
    "reverse_kl": ({"divergence": "reverse_kl"}, lambda x: x, lambda x: 1.0),
}
every_divergence = pytest.mark.parametrize(("knobs", "slope", "curvature"), SLOPES.values(), ids=SLOPES)


# ---- the formula -----------------------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_the_logistic_of_the_slopes_of_f(knobs, slope, curvature, dtype, tolerance):
    """f'(u) by hand, at log u."""
    found = values(make("fdpo", beta=0.2, **knobs), CHOSEN, REJECTED, dtype)
    for value, (a, b) in zip(found.tolist(), NEAR, strict=True):
        assert value == pytest.approx(exact(0.2 * (slope(a) - slope(b))), rel=tolerance)


@every_divergence
@pytest.mark.parametrize(("a", "b"), [(-4.0, 2.0), (0.0, 0.0), (3.0, -1.0), (25.0, 1.0)])
def test_gradient_is_that_of_the_formula(knobs, slope, curvature, a, b):
    (chosen,), (rejected,) = gradients(make("fdpo", beta=0.2, **knobs), [a], [b])
    weight = 0.2 * sigmoid(-0.2 * (slope(a) - slope(b)))
    assert chosen == pytest.approx(-weight * curvature(a), rel=1e-12)
    assert rejected == pytest.approx(weight * curvature(b), rel=1e-12)


def test_a_value_by_hand():
    """Forward KL, beta 1, u = 2 against u = 1/2: (1 - 1/2) - (1 - 2) = 1.5. JS: log(4/3) - log(2/3) = log 2."""
    sides = [math.log(2)], [-math.log(2)]
    forward = values(make("fdpo", beta=1, divergence="forward_kl"), *sides).item()
    assert forward == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-14)
    assert values(make("fdpo", beta=1), *sides).item() == pytest.approx(math.log(1.5), rel=1e-14)


def test_reverse_kl_is_dpo_to_the_last_bit():
    a, b = zip(*RATIOS, strict=True)
    loss = make("fdpo", divergence="reverse_kl")
    assert torch.equal(values(loss, a, b), values(make("dpo"), a, b))
    assert gradients(loss, a, b) == gradients(make("dpo"), a, b)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-6, "reverse_kl"), (1 - 1e-9, "forward_kl")])
def test_alpha_lies_between_the_two_kls(alpha, limit):
    found = values(make("fdpo", divergence="alpha", alpha=alpha), CHOSEN, REJECTED)
    torch.testing.assert_close(found, values(make("fdpo", divergence=limit), CHOSEN, REJECTED), rtol=1e-4, atol=1e-7)


def test_every_divergence_is_another_loss():
    found = [values(make("fdpo", **knobs), [-3.0, 2.0], [1.0, 0.5]) for knobs, _, _ in SLOPES.values()]
    for one, other in itertools.combinations(found, 2):
        assert not torch.isclose(one, other, rtol=1e-3).any()


# ---- the optimum -----------------------------------------------------------------------------------------------------


@every_divergence
def test_the_optimum_of_a_bandit_is_the_one_of_the_divergence(knobs, slope, curvature):
    """beta f'(pi / ref) is the reward, up to one constant: what maximises E r - beta D_f(pi || ref)."""
    reward = torch.tensor([0.0, 0.3, -0.5, 0.8], dtype=torch.float64)
    bandit = Bandit.bradley_terry(reward)
    ratios = bandit.optimum(make("fdpo", beta=1.5, **knobs)) - bandit.reference
    implied = torch.tensor([1.5 * slope(ratio) for ratio in ratios.tolist()], dtype=torch.float64)
    torch.testing.assert_close(implied - implied[0], reward, rtol=0, atol=1e-8)


# ---- far from the reference ------------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_nats_are_finite_and_pull_the_right_way(knobs, slope, curvature, dtype):
    loss, sides = make("fdpo", **knobs), list(itertools.product([-1e4, -500.0, 0.0, 500.0, 1e4], repeat=2))
    a, b = zip(*sides, strict=True)
    assert values(loss, a, b, dtype).isfinite().all()
    chosen, rejected = gradients(loss, a, b, dtype)
    assert all(math.isfinite(slope) and slope <= 0 for slope in chosen)
    assert all(math.isfinite(slope) and slope >= 0 for slope in rejected)
    (sunk,), _ = gradients(loss, [-1e4], [0.0], dtype)
    assert sunk <= -0.1


def test_a_sunken_answer_is_charged_as_the_formula_says_while_a_float_can_hold_it():
    loss = make("fdpo", beta=0.5, divergence="forward_kl")
    assert values(loss, [-600.0], [0.0]).item() == pytest.approx(0.5 * math.exp(600), rel=1e-12)
    assert values(loss, [-70.0], [0.0], torch.float32).item() == pytest.approx(0.5 * math.exp(70), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tamed_exponential_is_exact_and_then_its_own_tangent(dtype):
    edge = math.log(torch.finfo(dtype).max) - 16
    x = torch.tensor([-1e4, -3.0, 0.0, 30.0, edge - 1, edge + 1, edge + 2, 1e4], dtype=dtype, requires_grad=True)
    y = tamed_exp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y[:5], x[:5].exp()) and torch.equal(slope[:5], x[:5].exp())
    top = math.exp(edge)
    assert y[5:7].tolist() == pytest.approx([2 * top, 3 * top], rel=1e-4)
    assert slope[5:].tolist() == pytest.approx([top] * 3, rel=1e-4)
    assert y.isfinite().all()


# ---- knobs and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["js", "forward_kl", "reverse_kl"])
def test_alpha_beside_another_divergence_is_refused(divergence):
    with pytest.raises(
        RecipeError, match=rf"loss\.alpha: `fdpo` reads it with divergence: alpha alone, not .*{divergence}"
    ):
        make("fdpo", divergence=divergence, alpha=0.5)


@pytest.mark.parametrize("value", [0, 1, -0.5, math.nan])
def test_alpha_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.alpha: `fdpo` takes a number above 0, below 1, or null, not"):
        make("fdpo", divergence="alpha", alpha=value)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `fdpo` takes a number above 0, not"):
        make("fdpo", beta=value)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(
        RecipeError, match=r"loss\.divergence: `fdpo` takes one of js \| forward_kl \| alpha \| reverse_kl"
    ):
        make("fdpo", divergence="kl")


@every_divergence
def test_rewards_are_the_scaled_slopes(knobs, slope, curvature):
    found = metrics(make("fdpo", beta=0.5, **knobs), [1.5], [-0.5])
    assert found["rewards/chosen"] == pytest.approx([0.5 * slope(1.5)], rel=1e-12)
    assert found["rewards/rejected"] == pytest.approx([0.5 * slope(-0.5)], rel=1e-12)
    assert found["logratios/margin"] == [2.0]


def test_defaults():
    loss = make("fdpo")
    assert (loss.beta, loss.divergence, loss.alpha) == (0.1, "js", None)
    assert make("fdpo", divergence="alpha").alpha == 0.5
    assert make("fdpo", divergence="alpha", alpha=0.7).alpha == 0.7
